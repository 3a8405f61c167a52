"""Names that stand for a model of the fleet."""

from __future__ import annotations

from pathlib import Path

import pytest

from herd.errors import SettingsError
from herd.settings import load
from herd.web.aliases import Aliases

TABLE = {"claude-*-haiku": "small:1", "Claude-*": "big:1", "gpt-4?": "big:1", "known:1": "small:1"}


def aliases(*known: str) -> Aliases:
    return Aliases(TABLE, frozenset(known).__contains__)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (("claude-3-haiku",), ("small:1",)),
        (("claude-opus-4-1",), ("big:1",)),
        (("CLAUDE-Opus",), ("big:1",)),
        (("gpt-4o",), ("big:1",)),
        (("gpt-4o-mini",), ()),
        (("llama3",), ()),
        (("llama3", "claude-x"), ("llama3", "big:1")),
        (("claude-x", "llama3"), ("big:1", "llama3")),
    ],
)
def test_the_first_pattern_that_fits_counts(asked: tuple[str, ...], sent: tuple[str, ...]):
    table = aliases()
    assert table.resolve(asked) == table.resolve(asked) == sent


def test_a_model_of_the_fleet_goes_before_the_table_as_long_as_it_is_known():
    known: set[str] = set()
    table = Aliases(TABLE, known.__contains__)
    assert table.resolve(("library/known:1",)) == ()
    assert table.resolve(("known:1",)) == ("small:1",)
    known.add("known:1")
    assert table.resolve(("known:1",)) == ()
    known.clear()
    assert table.resolve(("known:1",)) == ("small:1",)


def test_without_a_table_nobody_is_asked_what_is_known():
    def never(name: str) -> bool:
        raise AssertionError(name)

    assert Aliases({}, never).resolve(("claude-x",)) == ()
    assert Aliases(TABLE, never).resolve(("llama3",)) == ()


def test_names_that_strangers_make_up_do_not_pile_up():
    table = aliases()
    for number in range(10_000):
        table.resolve((f"x{number}",))
    assert len(table._seen) <= 4096


def test_the_table_comes_from_the_variable_or_from_the_file(tmp_path: Path):
    settings, _ = load(
        {}, {"FLEET_MODEL_ALIASES": "claude-*=qwen3:8b, gpt-*=hf.co/a/b:Q4,", "FLEET_DATA_DIR": str(tmp_path)}
    )
    assert settings.model_aliases == {"claude-*": "qwen3:8b", "gpt-*": "hf.co/a/b:Q4"}
    (tmp_path / "herd.toml").write_text('[model_aliases]\n"claude-*" = "qwen3:8b"\n')
    settings, _ = load({}, {"FLEET_DATA_DIR": str(tmp_path)})
    assert settings.model_aliases == {"claude-*": "qwen3:8b"}


@pytest.mark.parametrize("wrong", ["claude-*", "claude-*=", "=m", "a=b c", "a=<script>"])
def test_an_alias_of_no_model_is_a_mistake_that_is_told(wrong: str):
    with pytest.raises(SettingsError, match="FLEET_MODEL_ALIASES"):
        load({}, {"FLEET_MODEL_ALIASES": wrong})


def test_a_table_of_something_else_is_a_mistake_too(tmp_path: Path):
    for wrong in ("model_aliases = 7", "[model_aliases]\na = 7", "model_aliases = [1]"):
        (tmp_path / "herd.toml").write_text(wrong + "\n")
        with pytest.raises(SettingsError, match="model_aliases"):
            load({}, {"FLEET_DATA_DIR": str(tmp_path)})
