"""The memory of what was unloaded lately: pure, and a hint only, so no file can break it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.backends.warm import WARM_FOR_S, WarmMemory

HOT, NONE = frozenset({"o smol"}), frozenset[str]()


def test_what_was_hot_and_is_gone_was_unloaded_now() -> None:
    memory = WarmMemory()
    memory.saw("o", HOT, 100.0)
    assert memory.unloaded_s_ago("o smol", 100.0) is None
    memory.saw("o", NONE, 105.0)
    assert memory.unloaded_s_ago("o smol", 165.0) == 60.0
    memory.saw("o", HOT, 200.0)
    assert memory.unloaded_s_ago("o smol", 200.0) is None


def test_it_is_forgotten_after_half_an_hour() -> None:
    memory = WarmMemory({"o smol": 0.0})
    assert memory.unloaded_s_ago("o smol", WARM_FOR_S - 1) == WARM_FOR_S - 1
    assert memory.unloaded_s_ago("o smol", WARM_FOR_S) is None
    memory.saw("o", NONE, WARM_FOR_S)
    assert (memory.dump(), memory.changed) == ("{}", True)


def test_backends_do_not_unload_each_others_models() -> None:
    memory = WarmMemory()
    memory.saw("o", HOT, 0.0)
    memory.saw("p", NONE, 1.0)
    assert memory.unloaded_s_ago("o smol", 1.0) is None


def test_a_wall_clock_set_back_counts_as_just_now() -> None:
    assert WarmMemory({"k": 1000.0}).unloaded_s_ago("k", 10.0) == 0.0


def test_only_a_change_is_worth_writing() -> None:
    memory = WarmMemory()
    memory.saw("o", HOT, 0.0)
    assert not memory.changed
    memory.saw("o", NONE, 1.0)
    assert memory.changed


@pytest.mark.parametrize(
    "text", [None, "", b"", "[]", "{", '"x"', b"\xff\xfe", '{"a": "b", "c": true}', '{"a": NaN}']
)
def test_a_file_that_is_no_memory_is_an_empty_one(text: str | bytes | None) -> None:
    assert WarmMemory.parse(text).dump() == "{}"


@given(st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)))
def test_what_is_dumped_is_parsed_again(times: dict[str, float]) -> None:
    assert WarmMemory.parse(WarmMemory(times).dump()).dump() == WarmMemory(times).dump()
