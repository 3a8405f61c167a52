"""Find one value in a JSON object's bytes and replace or remove it in place: a body is never rewritten.

The caller has parsed the body before (one orjson parse, which refuses everything that is not JSON); this
module only locates bytes in text that is known to be valid. It refuses what a parser silently accepts: a
second key of the same name in any case, because Go matches `MODEL` too and two readers would then see two
different models.

1. at the object's `{`: read key after key; skip each value without looking into it
2. a key that equals the wanted one is remembered; a second that folds to it is refused
3. skipping is regex- and find-driven: long strings (images) at memchr speed, the rest in C, one step of
   Python a bracket
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

_QUOTE, _OPEN_OBJECT, _OPEN_LIST = b'"{['
_BACKSLASH = ord("\\")

_OPEN = re.compile(rb"[ \t\r\n]*+\{")
#: A key without escapes and the colon behind it; commas and white space before it are eaten.
_KEY = re.compile(rb'[ \t\r\n,]*+"([^"\\]*+)"[ \t\r\n]*+:[ \t\r\n]*+')
_ESCAPED_KEY = re.compile(rb'[ \t\r\n,]*+"([^"\\]*+(?:\\.[^"\\]*+)*)"[ \t\r\n]*+:[ \t\r\n]*+', re.DOTALL)
_CLOSE = re.compile(rb"[ \t\r\n]*+\}")
_BLANKS_COMMA_BLANKS = re.compile(rb"[ \t\r\n]*+,[ \t\r\n]*+")
_SCALAR = re.compile(rb"[^ \t\r\n,\]}]++")
#: Inside a container: what is neither a bracket nor a long or escaped string, a bounded piece at a time. No
#: repeated group is possessive: CPython 3.11.2 (Debian 12) returns a wrong end for those.
_PLAIN = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]{0,64}+"){0,256}')
_SPECIAL = frozenset(b'"[]{}')
_ESCAPED_TAIL = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*"', re.DOTALL)
#: An ASCII character written as \\uXXXX, as a letter of a key may be.
ESCAPED_ASCII = re.compile(rb"\\u00[0-7]")
#: Up to here counting a word is quicker than skipping from string to string.
_COUNTED_BYTES = 32 * 1024


class JsonEditError(ValueError):
    """The bytes cannot be edited safely. `str()` is a sentence for the caller."""


class Member(NamedTuple):
    """Where one member of an object lies: its key's first quote, and its value as [start, end)."""

    before: int
    """Just behind the member before it, or behind the object's brace."""
    key: int
    start: int
    end: int


def find_top_level(body: bytes, key: str, *, at: int = 0) -> tuple[int, int] | None:
    """Where the value of `key` lies, as [start, end) without white space; None when the key is absent.

    As `find_member`, which says more.
    """
    member = find_member(body, key, at=at)
    return None if member is None else (member[2], member[3])


def find_member(body: bytes, key: str, *, at: int = 0) -> Member | None:
    """Where `key` and its value lie, without white space; None when the key is absent.

    `at` points at the object's `{` (white space before it is allowed), so a nested object is searched by
    passing the start of its own span. Raises JsonEditError on two keys that are equal in any case, and on
    bytes that are not a JSON object.
    """
    opened = _OPEN.match(body, at)
    if opened is None:
        raise JsonEditError("the request body must be a JSON object")
    wanted, folded = key.encode(), key.casefold()
    found: Member | None = None
    seen = False
    pos = opened.end()
    while (match := _KEY.match(body, pos) or _ESCAPED_KEY.match(body, pos)) is not None:
        before, start = pos, match.end()
        pos = _value_end(body, start)
        name = match.group(1)
        exact = name == wanted
        if not exact and (not _may_fold(name, wanted) or _decoded(name).casefold() != folded):
            continue
        if seen:
            raise JsonEditError(f"the request body has more than one field {key!r}")
        seen = True
        if exact or _decoded(name) == key:
            found = Member(before, match.start(1) - 1, start, pos)
    if _CLOSE.match(body, pos) is None:
        raise JsonEditError("the request body is not valid JSON")
    return found


def refuse_twins(body: bytes, others: Sequence[str], key: str) -> None:
    """Raises JsonEditError where two keys are equal to `key`, which is in small ASCII letters, in any case.
    `others` are the keys that a parser found in this body, in their folded form and without `key` itself.

    Keys that differ stand there; of equal ones a parser keeps the last, so a short text is asked: written
    once and never escaped is once. Else the text is read key by key.
    """
    counted = len(body) < _COUNTED_BYTES and not ESCAPED_ASCII.search(body)
    if not counted or key in others or body.count(b'"%b"' % key.encode()) != 1:
        find_top_level(body, key)


def replace_span(body: bytes, span: tuple[int, int], value: bytes) -> bytes:
    """The body with the bytes of one value exchanged. `value` is JSON itself."""
    return b"".join((memoryview(body)[: span[0]], value, memoryview(body)[span[1] :]))


def remove_member(body: bytes, member: Member) -> bytes:
    """The body without one member of an object: its key, its value, and the one comma that goes with them.

    White space around that comma goes too where another member follows; no other byte does.
    """
    follows = _BLANKS_COMMA_BLANKS.match(body, member.end)
    if follows is not None:
        return replace_span(body, (member.key, follows.end()), b"")
    comma = body.find(b",", member.before, member.key)
    return replace_span(body, (comma if comma >= 0 else member.key, member.end), b"")


def json_string(text: str) -> bytes:
    """A JSON string for `replace_span`, as UTF-8."""
    return json.dumps(text, ensure_ascii=False).encode()


def _may_fold(name: bytes, wanted: bytes) -> bool:
    """Whether decoding the name is worth it: same length in ASCII, or anything that hides letters."""
    if not name.isascii() or _BACKSLASH in name:
        return True
    return len(name) == len(wanted)


def _decoded(name: bytes) -> str:
    try:
        decoded = json.loads(b'"' + name + b'"')
    except ValueError as error:
        raise JsonEditError("the request body is not valid JSON") from error
    return str(decoded)


def _value_end(body: bytes, start: int) -> int:
    first = body[start] if start < len(body) else 0
    if first == _QUOTE:
        return _string_end(body, start)
    if first in (_OPEN_OBJECT, _OPEN_LIST):
        return _container_end(body, start)
    match = _SCALAR.match(body, start)
    if match is None:
        raise JsonEditError("the request body is not valid JSON")
    return match.end()


def _string_end(body: bytes, start: int) -> int:
    """Just behind the closing quote. A quote that no backslash precedes is never an escaped one."""
    end = body.find(b'"', start + 1)
    if end < 0:
        raise JsonEditError("the request body is not valid JSON")
    if body[end - 1] != _BACKSLASH:
        return end + 1
    match = _ESCAPED_TAIL.match(body, start + 1)
    if match is None:
        raise JsonEditError("the request body is not valid JSON")
    return match.end()


def _container_end(body: bytes, start: int) -> int:
    depth, pos, size = 0, start, len(body)
    while True:
        plain = _PLAIN.match(body, pos)
        pos = plain.end() if plain is not None else pos
        if pos >= size:
            raise JsonEditError("the request body is not valid JSON")
        byte = body[pos]
        if byte not in _SPECIAL:
            continue  # only the piece ended here
        if byte == _QUOTE:
            pos = _string_end(body, pos)
            continue
        depth += 1 if byte in (_OPEN_OBJECT, _OPEN_LIST) else -1
        pos += 1
        if depth == 0:
            return pos
