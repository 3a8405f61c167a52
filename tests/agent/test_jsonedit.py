"""Finding one value in a JSON object's bytes: what is found must be what a parser would read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.protocol.jsonedit import (
    JsonEditError,
    find_member,
    find_top_level,
    json_string,
    refuse_twins,
    remove_member,
    replace_span,
)

names = st.one_of(
    st.sampled_from(["model", "mode", "models", 'm"o', "é", "", "\\", "{", "a]b"]), st.text(max_size=8)
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
layouts = st.sampled_from(
    [
        {"ensure_ascii": True},
        {"ensure_ascii": False},
        {"ensure_ascii": False, "separators": (",", ":")},
        {"ensure_ascii": True, "indent": 2},
    ]
)


@given(st.dictionaries(names, values, max_size=6), layouts)
def test_the_span_of_a_key_holds_exactly_its_value(
    fields: dict[str, object], layout: dict[str, object]
) -> None:
    folded = [name.casefold() for name in fields]
    body = b" \n" + json.dumps(fields, **layout).encode("utf-8", "surrogatepass")
    for name, value in fields.items():
        if folded.count(name.casefold()) > 1:
            with pytest.raises(JsonEditError):
                find_top_level(body, name)
            continue
        span = find_top_level(body, name)
        assert span is not None
        assert json.loads(body[slice(*span)]) == value


spellings = st.sampled_from(
    ["model", "MODEL", "mod\\u0065l", "\\u006dodel", "\\u004DODEL", "models", "x", "é"]
)
contents = st.sampled_from(
    ['"m"', '"model"', '{"model":1}', '["model"]', '"\\"model\\""', '"\\u0041"', '"\\u00e9"']
)


@given(st.lists(st.tuples(spellings, contents), max_size=4), st.sampled_from([0, 40_000]))
def test_twins_are_refused_in_a_short_text_as_in_one_that_is_read_key_by_key(
    fields: list[tuple[str, str]], padding: int
) -> None:
    text = "{" + " " * padding + ",".join(f'"{key}" : {value}' for key, value in fields) + "}"
    others = [name.casefold() for name in json.loads(text) if name != "model"]
    try:
        find_top_level(text.encode(), "model")
    except JsonEditError as error:
        with pytest.raises(JsonEditError, match=str(error)):
            refuse_twins(text.encode(), others, "model")
    else:
        refuse_twins(text.encode(), others, "model")


@given(st.dictionaries(names, values, max_size=6), layouts, st.text(max_size=20))
def test_replacing_a_value_changes_nothing_else(
    fields: dict[str, object], layout: dict[str, object], new: str
) -> None:
    fields = {name: value for name, value in fields.items() if name.casefold() != "model"} | {"model": "old"}
    body = json.dumps(fields, **layout).encode("utf-8", "surrogatepass")
    span = find_top_level(body, "model")
    assert span is not None
    edited = replace_span(body, span, json_string(new) if new.isprintable() else json.dumps(new).encode())
    assert json.loads(edited) == fields | {"model": new}
    assert edited[: span[0]] == body[: span[0]]
    assert edited.endswith(body[span[1] :])


blanks = st.text(alphabet=" \n\t\r", max_size=3)
written = st.tuples(blanks, names, blanks, blanks, values, blanks)
"""A member and the white space around its key and its value."""


@given(st.lists(written, min_size=1, max_size=5, unique_by=lambda x: x[1].casefold()), layouts, st.data())
def test_what_is_left_of_an_object_is_its_other_members_byte_for_byte(
    members: list[tuple[str, str, str, str, object, str]], layout: dict[str, object], data: st.DataObject
) -> None:
    def text(*of: tuple[str, str, str, str, object, str]) -> str:
        return ",".join(
            f"{a}{json.dumps(name, **layout)}{b}:{c}{json.dumps(value, **layout)}{d}"
            for a, name, b, c, value, d in of
        )

    at = data.draw(st.integers(0, len(members) - 1))
    gone, earlier, later = members[at], members[:at], members[at + 1 :]
    body = f"{{{text(*members)}}}".encode("utf-8", "surrogatepass")
    member = find_member(body, gone[1])
    assert member is not None
    left = remove_member(body, member)
    if later:  # the first of them takes its place: its white space goes, that before the other stays
        kept = text(*earlier, (gone[0], *later[0][1:]), *later[1:])
    elif earlier:
        kept = text(*earlier) + gone[5]
    else:
        kept = gone[0] + gone[5]
    assert left == f"{{{kept}}}".encode("utf-8", "surrogatepass")
    assert json.loads(left) == {name: value for _, name, _, _, value, _ in earlier + later}


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (b'{"gone":1}', b"{}"),
        (b'{ "gone" : 1 }', b"{  }"),
        (b'{"gone":1,"b":2}', b'{"b":2}'),
        (b'{\n  "gone": 1,\n  "b": 2\n}', b'{\n  "b": 2\n}'),
        (b'{"a":1,"gone":[1,{"gone":2}],"b":2}', b'{"a":1,"b":2}'),
        (b'{"a":"," , "gone":"," }', b'{"a":","  }'),
        (b'{"a":1,\n  "g\\u006fne": {}\n}', b'{"a":1\n}'),
    ],
)
def test_a_member_goes_with_its_comma(body: bytes, left: bytes) -> None:
    member = find_member(body, "gone")
    assert member is not None
    assert remove_member(body, member) == left


def test_nothing_is_found_where_there_is_nothing_to_remove() -> None:
    assert find_member(b'{"a": {"gone": 1}, "b": "gone"}', "gone") is None
    with pytest.raises(JsonEditError):
        find_member(b'{"gone":1,"Gone":2}', "gone")


def test_millions_of_blanks_around_a_member_cost_no_time_to_speak_of() -> None:
    blanks = b" " * 5_000_000
    body = b'{"a":1' + blanks + b"," + blanks + b'"gone":1' + blanks + b"}"
    member = find_member(body, "gone")
    assert member is not None
    assert remove_member(body, member) == b'{"a":1' + blanks + blanks + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b"}',
        b'{"model":"a","MODEL":"b"}',
        b'{"Model":"a","stream":true,"mOdEl":"b"}',
        b'{"model":"a","\\u006dodel":"b"}',
        b'{"m\\u006Fdel":"a","x":{},"model":"b"}',
    ],
)
def test_a_second_model_in_any_case_or_spelling_is_refused(body: bytes) -> None:
    with pytest.raises(JsonEditError, match="more than one field 'model'"):
        find_top_level(body, "model")


def test_letters_that_go_folds_into_ascii_count_as_the_same_name() -> None:
    with pytest.raises(JsonEditError):
        find_top_level('{"options":1,"optionſ":2}'.encode(), "options")


@pytest.mark.parametrize(
    "body", [b'{"MODEL":"a"}', b'{"x":{"model":"a"}}', b'{"x":"\\"model\\":\\"a\\""}', b"{}"]
)
def test_a_name_that_is_not_exactly_there_is_not_found(body: bytes) -> None:
    assert find_top_level(body, "model") is None


def test_a_key_that_is_written_with_escapes_is_found() -> None:
    body = b'{"\\u006dodel" : "a"}'
    span = find_top_level(body, "model")
    assert span is not None
    assert body[slice(*span)] == b'"a"'


def test_a_nested_object_is_searched_from_its_own_start() -> None:
    body = b'{"num_ctx":1,"options":{"num_ctx": 8192 ,"x":[{"num_ctx":2}]},"model":"m"}'
    outer = find_top_level(body, "options")
    assert outer is not None
    inner = find_top_level(body, "num_ctx", at=outer[0])
    assert inner is not None
    assert body[slice(*inner)] == b"8192"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"model"',
        b"nul",
        b'{"model":',
        b'{"model":"a',
        b'{"model":{"a":1',
        b'{"model":"a\\"',
        b'{"a":1,"b',
    ],
)
def test_what_is_no_whole_object_is_refused_and_never_read_past_its_end(body: bytes) -> None:
    with pytest.raises(JsonEditError):
        find_top_level(body, "model")


@given(st.binary(max_size=60))
def test_any_bytes_at_all_give_a_span_none_or_a_refusal(junk: bytes) -> None:
    for body in (junk, b'{"model":' + junk, b'{"a":' + junk + b',"model":1}'):
        try:
            span = find_top_level(body, "model")
        except JsonEditError:
            continue
        assert span is None or 0 < span[0] < span[1] <= len(body)


def test_strings_full_of_escapes_take_linear_work() -> None:
    body = b'{"text":"' + b'\\\\\\"' * 200_000 + b'","model":"m"}'
    assert find_top_level(body, "model") == (len(body) - 4, len(body) - 1)
