"""docs/protocol.md is normative, so what it lists is compared with what the code knows."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from herd.proxy.failures import by_agent
from herd_node.models.manager import OFFERS
from herd_node.protocol import wire
from herd_node.protocol.auth import body_hash, mac_ok, node_key, parse_auth
from herd_node.protocol.names import is_model_name
from herd_node.protocol.routes import MANAGED

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def section(number: int) -> str:
    return PAGE.partition(f"\n## §{number} ")[2].partition("\n## §")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, heads and rulers included."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def wire_fields(cls: type, prefix: str = "") -> dict[str, tuple[str, ...]]:
    """Every field by its path on the page -> its words, if it may hold only certain ones."""
    found: dict[str, tuple[str, ...]] = {}
    hints = get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
        if is_dataclass(inner):
            many = "[]" if inner is not hint else ""
            found |= wire_fields(inner, f"{prefix}{item.name}{many}.")
            continue
        arms = [arm for arm in (hint, *get_args(hint)) if get_origin(arm) is Literal]
        found[prefix + item.name] = get_args(arms[0]) if arms else ()
    return found


def listed_fields(text: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for cells in rows(text):
        if len(cells) == 3:
            found |= dict.fromkeys(quoted(cells[0]), tuple(quoted(cells[1])))
    return found


def test_the_page_lists_every_field_of_a_beat_and_no_other():
    beat, _, _ = section(3).partition("### The reply")
    listed = listed_fields(beat)
    known = wire_fields(wire.Heartbeat)
    assert set(listed) - {"v", "capacity", "gateway"} == set(known)
    assert {name: listed[name] for name, words in known.items() if words} == {
        n: w for n, w in known.items() if w
    }


def test_the_page_lists_every_field_of_a_reply_and_no_other():
    listed = listed_fields(section(3).partition("### The reply")[2])
    known = wire_fields(wire.BeatReply)
    assert set(listed) == set(known)
    assert listed["state"] == known["state"]


def test_the_page_says_which_characters_no_model_name_has():
    characters = re.search("none of `([^`]+)`", section(3))
    assert characters is not None
    assert not any(is_model_name(f"a{character}b") for character in characters[1])


def test_the_router_knows_every_error_word_of_the_gateway():
    calls, _, _ = section(4).partition("### Managing models")
    words = [quoted(cells[0])[0] for cells in rows(calls) if quoted(cells[0])]
    assert len(words) == 10
    assert all(by_agent(word, "attic", "llama3", "", None) is not None for word in words)


def test_the_page_lists_every_call_that_manages_models_and_every_word_for_what_a_backend_can():
    listed = [quoted(cells[0])[0] for cells in rows(section(4).partition("### Managing models")[2])[2:]]
    assert listed == [
        f"{method} {route.path.replace('{digest}', '<digest>')}"
        for route in MANAGED.values()
        for method in route.methods
    ]
    (cells,) = [cells for cells in rows(section(3)) if quoted(cells[0]) == ["backends[].manages"]]
    assert set(quoted(cells[2])) == set(OFFERS)


def test_the_example_of_a_signature_is_a_good_one():
    value = re.search("^header (.*)$", section(2), re.MULTILINE)
    key = re.search("^key +([0-9a-f]+)$", section(2), re.MULTILINE)
    assert value is not None
    assert key is not None
    header = parse_auth(value[1])
    assert node_key(bytes(range(32)), header.key_id).hex() == key[1]
    assert header.body_sha256 == body_hash(b"{}")
    assert mac_ok(bytes.fromhex(key[1]), header, direction="beat", method="POST", target="/heartbeat")
