"""Flags and variables of the agent: precedence, and sentences that name the source but never the value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from herd_node.settings import PREFIX, Settings, SettingsError, load, surroundings

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def test_a_flag_goes_before_a_variable_and_a_variable_before_the_default() -> None:
    env = {"FLEET_NODE_PORT": "2000", "FLEET_NODE_ID": "from-env"}
    settings, warnings = load({"port": "3000"}, env)
    assert (settings.port, settings.node_id, settings.drain_timeout_s) == (3000, "from-env", 120)
    assert warnings == ()


def test_every_setting_has_a_variable_that_is_read() -> None:
    values = {
        "ROUTER_URL": ("router", "http://router:11435"),
        "ID": ("n", "n"),
        "BACKEND": ("h:1, http://[::1]:2/,h:1", ("http://h:1", "http://[::1]:2")),
        "EMBEDDED": ("true", True),
        "MODEL": ("/m.gguf", Path("/m.gguf")),
        "MODELS_DIR": ("/models", Path("/models")),
        "HOST": ("*", "*"),
        "PORT": ("0", 0),
        "DATA_DIR": ("/d", Path("/d")),
        "HEARTBEAT_INTERVAL": ("2.5", 2.5),
        "JOIN": ("-", "-"),
        "SLOTS": ("3", 3),
        "ADDRESS": ("192.0.2.1,2001:db8::1", ("192.0.2.1", "2001:db8::1")),
        "EMBEDDED_THREADS": ("4", 4),
        "DRAIN_TIMEOUT_S": ("1", 1.0),
        "LOG_LEVEL": ("debug", "debug"),
    }
    settings, _ = load({}, {PREFIX + name: value for name, (value, _) in values.items()})
    read = {name: getattr(settings, name.lower()) for name in values}
    assert read == {name: wanted for name, (_, wanted) in values.items()}
    assert {name.lower() for name in values} == set(Settings.model_fields)


def test_an_unknown_variable_is_a_warning_and_other_programs_are_left_alone() -> None:
    _, warnings = load({}, {"FLEET_NODE_PROT": "1", "FLEET_PORT": "1", "FLEETNODE_X": "1"})
    assert len(warnings) == 1
    assert warnings[0].startswith("FLEET_NODE_PROT is not a setting")


@pytest.mark.parametrize(
    ("flags", "env", "start"),
    [
        ({"port": "x"}, {}, "--port: "),
        ({"port": "65536"}, {}, "--port: "),
        ({}, {"FLEET_NODE_PORT": "-1"}, "FLEET_NODE_PORT: "),
        ({"id": "a b"}, {}, "--node-id: must be 1 to 64 characters"),
        ({"id": "../x"}, {}, "--node-id: "),
        ({"id": ".."}, {}, "--node-id: "),
        ({"backend": ("ftp://x",)}, {}, "--backend: must look like http://HOST:PORT"),
        ({"backend": ("http://x:1/v1",)}, {}, "--backend: must look like http://HOST:PORT"),
        ({"router_url": "http://u:p@h"}, {}, "--router-url: must look like"),
        ({}, {"FLEET_NODE_ADDRESS": "host.example"}, "FLEET_NODE_ADDRESS: "),
        ({"heartbeat_interval": "0"}, {}, "--heartbeat-interval: "),
        ({"log_level": "loud"}, {}, "--log-level: "),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_where_it_came_from(
    flags: dict[str, object], env: dict[str, str], start: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load(flags, env)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_what_ollama_itself_would_not_understand_is_taken_as_absent() -> None:
    assert surroundings({"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_MODELS": "/m"})[:3] == (4, None, Path("/m"))
    assert surroundings({"OLLAMA_NUM_PARALLEL": "x", "OLLAMA_MAX_LOADED_MODELS": "0"})[:3] == (None,) * 3


def test_the_page_lists_every_setting_of_the_agent_with_its_own_words() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert set(re.findall(r"`(FLEET_NODE_\w+)`", page)) == {
        PREFIX + name.upper() for name in Settings.model_fields
    }
    for name, field in Settings.model_fields.items():
        assert field.description is not None
        assert field.description in page, name


@pytest.mark.parametrize(
    ("env", "host", "proxy"),
    [
        ({}, "huggingface.co", None),
        ({"HTTPS_PROXY": "http://p:3128"}, "huggingface.co", "http://p:3128"),
        ({"https_proxy": "p:3128", "HTTPS_PROXY": "http://q:1"}, "huggingface.co", "http://p:3128"),
        ({"ALL_PROXY": "http://p:3128"}, "huggingface.co", "http://p:3128"),
        ({"HTTP_PROXY": "http://p:3128"}, "huggingface.co", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".hf.co, huggingface.co"}, "huggingface.co", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".hf.co"}, "cdn.HF.co", None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "gface.co"}, "huggingface.co", "http://p:1"),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": "*"}, "huggingface.co", None),
    ],
)
def test_the_way_outward_is_read_as_other_programs_read_it(
    env: dict[str, str], host: str, proxy: str | None
) -> None:
    assert surroundings(env).proxy.for_host(host) == proxy


def test_a_mirror_of_hugging_face_is_taken_from_its_own_variable() -> None:
    assert surroundings({}).hub == "https://huggingface.co"
    assert surroundings({"HF_ENDPOINT": "https://mirror.example/"}).hub == "https://mirror.example"
