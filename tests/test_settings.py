"""The router's settings: who wins, what is refused in one sentence, what is only a warning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from herd.errors import SettingsError
from herd.settings import Settings, load


def read(
    tmp_path: Path, file: str | None = None, *, flags: dict[str, Any] | None = None, **env: str
) -> tuple[Settings, tuple[str, ...]]:
    if file is not None:
        (tmp_path / "herd.toml").write_text(file, encoding="utf-8")
    return load({"data_dir": tmp_path, **(flags or {})}, {**env})


def sentence(tmp_path: Path, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(SettingsError) as refused:
        read(tmp_path, *args, **kwargs)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("flag", "variable", "file", "expected"),
    [
        (1, "2", 3, 1),
        (None, "2", 3, 2),
        (None, None, 3, 3),
        (None, None, None, 11435),
        (1, None, 3, 1),
        (1, "2", None, 1),
        (None, "", 3, 3),  # an empty variable is none
    ],
)
def test_flag_then_variable_then_file_then_default(
    tmp_path: Path, flag: int | None, variable: str | None, file: int | None, expected: int
):
    flags = {} if flag is None else {"port": flag}
    env = {} if variable is None else {"FLEET_PORT": variable}
    settings, warnings = read(tmp_path, None if file is None else f"port = {file}", flags=flags, **env)
    assert (settings.port, warnings) == (expected, ())


def test_each_setting_has_its_variable(tmp_path: Path):
    odd: dict[str, tuple[str, Any]] = {
        "host": ("10.0.0.1", "10.0.0.1"),
        "data_dir": (str(tmp_path / "x"), tmp_path / "x"),
        "log_level": ("debug", "debug"),
        "allow_net": ("10.0.0.0/8, fd00::/8", ("10.0.0.0/8", "fd00::/8")),
        "mdns": ("0", False),
        "with_node": ("true", True),
        "score_points": ("7.5", 7.5),
        "auto_pull": ("trusted", "trusted"),
        "progress": ("reasoning", "reasoning"),
        "context_protection": ("warn", "warn"),
        "vram_fallback": ("1", True),
        "model_aliases": ("claude-*=m:1, gpt-?=n", {"claude-*": "m:1", "gpt-?": "n"}),
    }
    for name, field in Settings.model_fields.items():
        text, value = odd.get(name, ("5", 5))
        if name == "max_body_bytes":
            text, value = "4096", 4096
        settings, warnings = load({}, {f"FLEET_{name.upper()}": text})
        assert (getattr(settings, name), warnings) == (value, ()), name
        assert field.description
        assert field.description.endswith(".")


def test_the_names_that_users_rely_on_are_there():
    names = {f"FLEET_{name.upper()}" for name in Settings.model_fields}
    assert names >= {
        *("FLEET_HOST", "FLEET_PORT", "FLEET_DATA_DIR", "FLEET_HOLD_TIMEOUT_S", "FLEET_WAIT_TIMEOUT_S"),
        *("FLEET_CONNECT_TIMEOUT_S", "FLEET_FIRST_RECORD_TIMEOUT_S", "FLEET_GAP_TIMEOUT_S"),
        *("FLEET_TOTAL_TIMEOUT_S", "FLEET_DRAIN_TIMEOUT_S", "FLEET_MAX_BODY_BYTES", "FLEET_MAX_WAITING"),
    }


def test_the_defaults_are_those_that_the_documents_name(tmp_path: Path):
    settings, _ = read(tmp_path)
    assert (settings.host, settings.port, settings.mdns) == ("", 11435, True)
    assert (settings.hold_timeout_s, settings.wait_timeout_s, settings.drain_timeout_s) == (30, 300, 25)
    assert (settings.max_body_bytes, settings.max_waiting, settings.score_points) == (33554432, 1000, 15)
    assert load({}, {})[0].data_dir == Path.home() / ".fleet-manager"


def test_settings_do_not_change(tmp_path: Path):
    settings, _ = read(tmp_path)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path):
    said = sentence(tmp_path, "port = 1\nhost_name = 'x'\nprot = 2\n")
    assert "unknown key host_name, prot" in said
    assert str(tmp_path / "herd.toml") in said
    assert "known keys are" in said


def test_the_file_cannot_move_the_folder_that_it_lies_in(tmp_path: Path):
    assert "unknown key data_dir" in sentence(tmp_path, "data_dir = '/elsewhere'")


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("port = 70000", "port"),
        ("port = 'x'", "port"),
        ("port = [1]", "port"),
        ("log_level = 'loud'", "log_level"),
        ("allow_net = 'nowhere'", "allow_net"),
        ("allow_net = ['10.0.0.0/99']", "allow_net"),
        ("allow_net = 7", "allow_net"),
        ("hold_timeout_s = 0", "hold_timeout_s"),
        ("wait_timeout_s = nan", "wait_timeout_s"),
        ("score_points = 16", "score_points"),
        ("max_body_bytes = 3", "max_body_bytes"),
        ("max_attempts = 0", "max_attempts"),
        ("mdns = 'perhaps'", "mdns"),
        ("[port]\nx = 1", "port"),
    ],
)
def test_a_bad_value_is_named_with_its_source(tmp_path: Path, file: str, word: str):
    assert sentence(tmp_path, file).startswith(f"herd.toml: {word}: ")


def test_the_source_that_won_is_the_one_that_is_blamed(tmp_path: Path):
    assert sentence(tmp_path, "port = 1", FLEET_PORT="x").startswith("FLEET_PORT: ")
    assert sentence(tmp_path, "port = 1", flags={"port": -1}, FLEET_PORT="x").startswith("--port: ")
    assert "'x'" in sentence(tmp_path, FLEET_PORT="x")


@pytest.mark.parametrize("file", ["port = ", "= 1", "port 1", "\x00", "[a\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, file: str):
    said = sentence(tmp_path, file)
    assert "not valid TOML" in said
    assert str(tmp_path) in said


def test_a_file_in_another_encoding_is_named(tmp_path: Path):
    (tmp_path / "herd.toml").write_bytes(b"host = '\xff'")
    assert "not valid TOML" in sentence(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "herd.toml").mkdir()
    assert "cannot be read" in sentence(tmp_path)


def test_another_file_must_exist(tmp_path: Path):
    other = tmp_path / "other.toml"
    with pytest.raises(SettingsError, match="no such file"):
        load({"data_dir": tmp_path}, {}, other)
    with pytest.raises(SettingsError, match="no such file"):
        load({"data_dir": tmp_path}, {"FLEET_CONFIG": str(other)})
    other.write_text("port = 5")
    (tmp_path / "herd.toml").write_text("port = 6")
    for settings, warnings in (
        load({"data_dir": tmp_path}, {}, other),
        load({"data_dir": tmp_path}, {"FLEET_CONFIG": str(other)}),
    ):
        assert (settings.port, warnings) == (5, ())


def test_the_file_is_looked_for_in_the_folder_of_the_variable(tmp_path: Path):
    (tmp_path / "herd.toml").write_text("port = 7")
    assert load({}, {"FLEET_DATA_DIR": str(tmp_path)})[0].port == 7


def test_a_home_folder_is_expanded():
    settings, _ = load({"data_dir": "~/somewhere"}, {})
    assert settings.data_dir == Path.home() / "somewhere"


def test_an_unknown_variable_is_a_warning_and_an_agents_is_none(tmp_path: Path):
    settings, warnings = read(
        tmp_path, FLEET_PROT="1", FLEET_="x", FLEET_NODE_PORT="x", FLEET_NODE_NONSENSE="x", fleet_host="x"
    )
    assert [warning.split()[0] for warning in warnings] == ["FLEET_", "FLEET_PROT"]
    assert all("docs/settings.md" in warning for warning in warnings)
    assert (settings.port, settings.host) == (11435, "")


def test_networks_come_as_text_or_list(tmp_path: Path):
    expected = ("10.0.0.0/8", "fd00::/8")
    assert read(tmp_path, "allow_net = ['10.0.0.0/8', 'fd00::/8']")[0].allow_net == expected
    assert read(tmp_path, "allow_net = '10.0.0.0/8,fd00::/8'")[0].allow_net == expected
    assert read(tmp_path, flags={"allow_net": ["10.0.0.0/8", "fd00::/8"]})[0].allow_net == expected
    assert read(tmp_path, "allow_net = ''", FLEET_ALLOW_NET=" ,")[0].allow_net == ()
