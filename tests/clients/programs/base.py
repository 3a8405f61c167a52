"""What every client is asked to do, and with which words."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict

WORDS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "questions.json").read_text())
ASK = [{"role": "user", "content": WORDS["ask"]}]
PICK = [{"role": "user", "content": WORDS["pick"]}]
WEATHER = [{"role": "user", "content": WORDS["weather"]}]
ENDLESS = [{"role": "user", "content": WORDS["endless"]}]


class Colour(BaseModel):
    """One colour."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "green", "blue"]


class Called(NamedTuple):
    """What a model asked of a tool, and what it said when it had the result."""

    name: str
    arguments: dict[str, Any]
    then: str


class Missed(NamedTuple):
    """The exception that a client raised: its classes, the status in it, and its word for what is wrong."""

    classes: list[str]
    status: int
    word: str


def missed(error: Exception, status: int, word: str) -> Missed:
    return Missed([one.__name__ for one in type(error).__mro__], status, word)


class Client(Protocol):
    leave: Callable[[], None]

    def chat(self, model: str) -> str: ...
    def stream(self, model: str) -> list[str]:
        """The pieces of text."""

    def tools(self, model: str) -> Called: ...
    def embeddings(self, model: str) -> list[list[float]]: ...
    def structured(self, model: str) -> dict[str, Any]: ...
    def models(self) -> list[str]: ...
    def unknown(self) -> Missed:
        """Asks for a model that nobody has."""

    def begin(self, model: str) -> Callable[[], None]:
        """Reads the first piece of a very long answer; returns how to leave."""


def stay_at_home() -> None:
    """From here on this process connects to loopback only, and asks no name server."""

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        elif event == "socket.getaddrinfo":
            host = arguments[0]
        else:
            return
        if not _is_home(host):
            raise PermissionError(f"a client wants to reach {host}")

    sys.addaudithook(look)


def _is_home(host: str | None) -> bool:
    try:
        return host in (None, "localhost") or ip_address(host).is_loopback
    except ValueError:
        return False
