"""A request body's fields, checked as Ollama checks them, refused in its words. Pure.

Ollama decodes into Go structs, so its complaints name Go types; clients match on those sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import orjson

from herd_node.translate.base import Refusal

Json = Mapping[str, object]


def parse_object(body: bytes, struct: str) -> dict[str, object]:
    """The body as an object; `struct` is the Go type that Ollama would name."""
    if not body.strip():
        raise Refusal(400, "missing request body")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        at_the_end = error.pos >= len(error.doc.rstrip())
        raise Refusal(400, "unexpected EOF" if at_the_end else f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"json: cannot unmarshal {_go_word(value)} into Go value of type api.{struct}")
    return value


class Fields:
    """Typed reads of one object; null means absent, as in Go."""

    __slots__ = ("_struct", "values")

    def __init__(self, values: Json, struct: str) -> None:
        self.values = values
        self._struct = struct

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if value is None:
            return ""
        return value if isinstance(value, str) else self._wrong(name, value, "string")

    def flag(self, name: str) -> bool | None:
        value = self.values.get(name)
        return value if value is None or isinstance(value, bool) else self._wrong(name, value, "bool")

    def whole_number(self, name: str) -> int:
        value = self.values.get(name)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong(name, value, "int")
        return value

    def items(self, name: str, go_type: str) -> list[object]:
        value = self.values.get(name)
        if value is None:
            return []
        return value if isinstance(value, list) else self._wrong(name, value, go_type)

    def mapping(self, name: str, go_type: str) -> dict[str, object]:
        value = self.values.get(name)
        if value is None:
            return {}
        return value if isinstance(value, dict) else self._wrong(name, value, go_type)

    def _wrong(self, name: str, value: object, go_type: str) -> NoReturn:
        raise wrong_type(value, f"{self._struct}.{name}", go_type)


def wrong_type(value: object, where: str, go_type: str) -> Refusal:
    """The refusal of a value whose JSON type does not fit."""
    word = _go_word(value)
    if go_type == "int" and isinstance(value, float):
        word = f"number {value:g}"
    return Refusal(400, f"json: cannot unmarshal {word} into Go struct field {where} of type {go_type}")


def _go_word(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"
