"""Large bodies are parsed without the middle of their long strings: nobody may see a difference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd.dialects import DIALECT_BY_PATH, Parsed, base
from herd.errors import ApiError, BadRequest
from herd_node.protocol import jsonedit
from herd_node.protocol.routes import FORWARDED, FORWARDED_BY_PATH

PATHS = [route.path for route in FORWARDED if route.model_at == "body"]
CUT = base._CUT_STRING_BYTES
MESSAGE: dict[str, Any] = {"role": "user", "content": "what is this?"}


def outcome(path: str, body: bytes) -> Parsed | tuple[int, str]:
    route = FORWARDED_BY_PATH[path]
    try:
        return DIALECT_BY_PATH[path].parse(route, body)
    except ApiError as error:
        return error.status, error.message


@contextmanager
def nothing_cut() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_CUT_BODY_BYTES", 1 << 60)
        yield


def same(path: str, body: bytes) -> Parsed | tuple[int, str]:
    """What comes of the body, cut or not."""
    cut = outcome(path, body)
    with nothing_cut():
        assert outcome(path, body) == cut
    return cut


#: What a long string is made of: what may be left out, and what may not.
UNITS = ["iVBORw0KGgo", "lorem ipsum ", "a, b ,", "héllo ", "x\n", "\\", '"', "\0", "\0" + "99\0", "日本"]
long_strings = st.builds(
    lambda unit, size, ends: ends + unit * (size // len(unit) + 1) + ends,
    st.sampled_from(UNITS),
    st.sampled_from([300, 60_000, CUT - 12, CUT, CUT + 1, CUT + 7, 3 * CUT]),
    st.sampled_from(["", '"', "\\", '\\"', "é", "{[", "\0"]),
)
texts = st.one_of(long_strings, st.sampled_from(["", "short", "model", "data:x"]))
images = st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, texts)
parts = st.one_of(images, st.builds(lambda text: {"type": "text", "text": text}, texts))
calls = st.builds(lambda text: [{"function": {"name": "f", "arguments": text}}], texts)
messages = st.fixed_dictionaries(
    {"role": texts, "content": st.one_of(texts, st.lists(parts, max_size=2))},
    optional={"images": st.lists(texts, max_size=2), "tool_calls": calls},
)
bodies = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "a/b:c", "x" * 2 * CUT])},
    optional={
        "messages": st.lists(messages, max_size=2),
        "prompt": texts,
        "input": st.one_of(texts, st.lists(texts, max_size=2)),
        "images": st.lists(texts, max_size=1),
        "tools": st.builds(lambda text: [{"description": text}], texts),
        "user": texts,
        "metadata": st.builds(lambda text: {"tags": text}, texts),
        "format": texts,
        "k" * 2 * CUT: texts,
        "n": st.just([7] * CUT),
    },
)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), body=bodies, ascii_only=st.booleans())
def test_a_cut_body_is_read_as_the_whole_is(path: str, body: dict[str, Any], ascii_only: bool):
    same(path, json.dumps(body, ensure_ascii=ascii_only).encode())


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    body=bodies,
    at=st.one_of(st.integers(0, 400), st.integers(-400, -1), st.integers()),
    spoilt=st.sampled_from([b"", b'"', b"\\", b"\xff", b"{", b"]", b'","', b"\\u0000", b"\\u12", b'"tags"']),
)
def test_a_spoilt_body_is_refused_as_the_whole_is(body: dict[str, Any], at: int, spoilt: bytes):
    raw = json.dumps(body, ensure_ascii=False).encode()
    at %= len(raw)
    same("/v1/chat/completions", raw[:at] + spoilt + raw[at + 1 :])


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "A" * 4 * CUT}}]},
        {"role": "user", "content": "A" * 4 * CUT},
        {"role": "user", "content": 'say "hi"', "tool_calls": [{"x": "A" * 4 * CUT, "y": "é"}]},
    ],
)
def test_a_long_string_is_cut_and_counts_as_what_it_was(message: dict[str, Any]):
    body = json.dumps({"model": "m", "messages": [MESSAGE, message]}).encode()
    head = base.read_object(body)
    assert head.cut
    assert len(head.text) < CUT
    parsed = same("/v1/chat/completions", body)
    assert isinstance(parsed, Parsed)
    assert len(parsed.prefixes) == 2


def test_three_images_of_one_message_are_all_cut():
    urls = ["A" * 3 * CUT, "B" * 2 * CUT, "C" * CUT, "D" * (CUT + 1)]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    body = json.dumps({"model": "m", "messages": [{"role": 'a "quoted\\" \\', "content": parts}]}).encode()
    assert len(base.read_object(body).text) < 4 * CUT
    parsed = same("/v1/chat/completions", body)
    assert isinstance(parsed, Parsed)
    assert parsed.needs == {"completion", "vision"}
    assert parsed.est_tokens > 4 * 600


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3\x28", b"\x00", b"\n", b"\x1f"])
def test_what_no_parser_takes_is_refused_except_control_characters_in_what_is_left_out(bad: bytes):
    start, middle = b'{"model":"m","input":"', b"A" * 4 * CUT
    for at in (0, 100, len(middle) - 100, len(middle) - 1):
        assert outcome("/v1/embeddings", start + middle[:at] + bad + middle[at:] + b'"}')[0] == 400
    body = start + middle[: 2 * CUT] + bad + middle[2 * CUT :] + b'"}'
    taken = isinstance(outcome("/v1/embeddings", body), Parsed)
    assert taken == (bad < b"\x20")  # the backend's parser sees all of it


KEYS = ["model", "MODEL", "Model", "mod\\u0065l", "\\u006dodel", "\\u004DODEL", "x", "models", "name", "é"]
VALUES = ['"m"', '"model"', '{"model":1}', '["model","model"]', '"\\"model\\""', "null", '"\\u0041"']


@given(
    fields=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=4),
    padding=st.sampled_from([0, 40_000]),
)
def test_twins_of_the_model_are_refused_as_reading_key_by_key_does(
    fields: list[tuple[str, str]], padding: int
):
    fields = [*fields, ("model", '"m"')]
    text = "{" + " " * padding + ",".join(f'"{key}" : {value}' for key, value in fields) + "}"
    head = base.read_object(text.encode())
    try:
        jsonedit.find_top_level(text.encode(), "model")
    except jsonedit.JsonEditError as error:
        with pytest.raises(BadRequest, match=str(error)):
            base.refuse_twins(head, "model")
    else:
        base.refuse_twins(head, "model")


def test_nothing_but_ascii_letters_folds_into_the_letters_of_the_model():
    """Else a length or a byte could not tell that a key is another one."""
    letters = set("modelna")
    folding = {chr(point) for point in range(0x110000) if set(chr(point).casefold()) <= letters}
    assert {char.lower() for char in folding} == letters
