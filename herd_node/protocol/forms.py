"""A multipart form: which fields it has and where they stand, without taking its files apart.

Sans-I/O, and fit for bodies in mapped files: it goes from boundary to boundary with `find`, and looks only at
the heads of the parts. Router and gateway read with the same eyes, so they see the same model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple

Body = bytes | mmap

MAX_PARTS = 64
MAX_HEAD_BYTES = 8192
MAX_FIELD_BYTES = 64 * 1024

_BOUNDARY = re.compile(
    rb'multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"\r\n]{1,70})"|([^\s;",]{1,70}))', re.I
)
_NAME = re.compile(rb'(?:^|;)\s*name=(?:"([^"\r\n]*)"|([^\s;"]+))', re.I)
_FILE = re.compile(rb"(?:^|;)\s*filename\*?=", re.I)


class FormError(ValueError):
    """It is no form that can be read; `str()` is a sentence."""


class Field(NamedTuple):
    """`start` and `end` are where its value stands in the body."""

    value: str
    start: int
    end: int


class Form(NamedTuple):
    fields: dict[str, Field]
    files: frozenset[str]
    """Names of the parts that are files."""


def read_form(content_type: bytes, body: Body) -> Form:
    """Raises FormError. A field that stands there twice is refused: two readers might take different ones."""
    found = _BOUNDARY.match(content_type.strip())
    if found is None:
        raise FormError("the body must be multipart/form-data with a boundary")
    fields: dict[str, Field] = {}
    files: set[str] = set()
    for head, start, end in _parts(body, found[1] or found[2]):
        name, is_file = _name_of(head)
        if is_file:
            files.add(name)
            continue
        if end - start > MAX_FIELD_BYTES:
            raise FormError(f"the field '{name}' is longer than {MAX_FIELD_BYTES} bytes")
        if name in fields and not name.endswith("[]"):
            raise FormError(f"the field '{name}' stands in the form twice")
        try:
            fields[name] = Field(body[start:end].decode(), start, end)
        except UnicodeDecodeError:
            raise FormError(f"the field '{name}' is not UTF-8") from None
    return Form(fields, frozenset(files))


def _parts(body: Body, boundary: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Head, start and end of each part, in order."""
    mark = b"--" + boundary
    at = 0 if body[: len(mark)] == mark else body.find(b"\r\n" + mark) + 2
    if at == 1:  # there is none
        raise FormError("the form does not hold its boundary")
    for _ in range(MAX_PARTS):
        at += len(mark)
        if body[at : at + 2] == b"--":
            return
        line_end = body.find(b"\r\n", at, at + 200)
        if line_end < 0 or body[at:line_end].strip(b" \t"):
            raise FormError("the form is cut off or badly framed")
        head_end = body.find(b"\r\n\r\n", line_end, line_end + MAX_HEAD_BYTES)
        if head_end < 0:
            raise FormError("a part of the form has no end of its head")
        start = head_end + 4
        end = body.find(b"\r\n" + mark, head_end + 2)
        if end < 0:
            raise FormError("the form is cut off or badly framed")
        yield body[line_end + 2 : head_end], start, max(start, end)
        at = end + 2
    raise FormError(f"the form has more than {MAX_PARTS} parts")


def _name_of(head: bytes) -> tuple[str, bool]:
    """The part's name, and whether it is a file."""
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() != b"content-disposition":
            continue
        found = _NAME.search(value)
        if found is not None:
            name = found[1] if found[1] is not None else found[2]
            return name.decode("utf-8", "replace")[:200], _FILE.search(value) is not None
    raise FormError("a part of the form has no name")
