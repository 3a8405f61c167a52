"""What is sent: one raw request a scenario, and how often. The table is the issue's list, nothing else.

The prompt of every request differs from all others by eight digits (`@@@@@@@@`, see native/load.c), so no
cache sees the same prompt twice; the system message is the same for all, as in a real application.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from bench import fleet

Kind = Literal["closed", "once"]
Unit = Literal["request", "chunk"]

_MARK = "@@@@@@@@"
_SYSTEM = "You are a helpful assistant. Answer in one short sentence and do not invent anything."
#: Beside the tokens a stream has a role record, a finish record and [DONE].
_FRAME_RECORDS = 3
_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One row. `closed`: each connection asks anew as soon as it is answered, for the time of a cell;
    `once`: each connection asks once, all opened within `ramp_s`."""

    name: str
    title: str
    connections: int
    body: Callable[[str], dict[str, object]]
    kind: Kind = "closed"
    unit: Unit = "request"
    tokens: int = 0
    """Of a stream; 0: a whole answer."""
    ramp_s: float = 0.0
    limit_s: float = 30.0
    without: frozenset[str] = frozenset()
    """Targets that it does not run through."""
    wide: bool = False
    """Needs more slots than machines have: uses the model that claims them, where there is one."""
    has_goal: bool = True

    @property
    def records(self) -> int:
        return self.tokens + _FRAME_RECORDS if self.tokens else 0

    def request(self, model: str) -> bytes:
        """Head and body as they go over the wire."""
        body = json.dumps(self.body(model)).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"accept: */*\r\nuser-agent: herd-bench\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


def _chat(model: str, content: object, **more: object) -> dict[str, object]:
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
    return {"model": model, "messages": messages, **more}


def _short(model: str) -> dict[str, object]:
    return _chat(model, f"Question {_MARK}: what does the fox jump over?", max_tokens=16)


def _stream(tokens: int, delay_ms: int = 0) -> Callable[[str], dict[str, object]]:
    pace = f" (delay_ms={delay_ms})" if delay_ms else ""  # the synthetic backend reads it from the prompt

    def body(model: str) -> dict[str, object]:
        question = f"Question {_MARK}{pace}: tell me about the fox."
        return _chat(model, question, max_tokens=tokens, stream=True)

    return body


def _long_prompt(model: str) -> dict[str, object]:
    words = random.Random(1).choices(
        ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "rests"], k=64 * _KIB
    )
    text = " ".join(words)[: 256 * _KIB]
    return _chat(model, f"Question {_MARK}: sum this up. {text}", max_tokens=16)


def _image(model: str) -> dict[str, object]:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    data = "".join(random.Random(2).choices(alphabet, k=8 * _KIB * _KIB))
    url = f"data:image/png;base64,{data}"
    parts = [
        {"type": "text", "text": f"Question {_MARK}: what is this?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    return _chat(model, parts, max_tokens=16)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(name="short-1", title="short chats, 1 connection", connections=1, body=_short),
    Scenario(name="short-8", title="short chats, 8 connections", connections=8, body=_short),
    Scenario(name="short-64", title="short chats, 64 connections", connections=64, body=_short),
    Scenario(
        name="short-256",
        title="short chats, 256 connections",
        connections=256,
        body=_short,
        has_goal=False,
    ),
    Scenario(
        name="stream-1",
        title="128-token streams without delay, 1 connection",
        connections=1,
        body=_stream(128),
        unit="chunk",
        tokens=128,
    ),
    Scenario(
        name="stream-16",
        title="128-token streams without delay, 16 connections",
        connections=16,
        body=_stream(128),
        unit="chunk",
        tokens=128,
    ),
    Scenario(
        name="stream-64",
        title="128-token streams without delay, 64 connections",
        connections=64,
        body=_stream(128),
        unit="chunk",
        tokens=128,
    ),
    Scenario(
        name="slow-500",
        title="500 slow streams (20 tokens/s, 5 s)",
        connections=500,
        body=_stream(100, delay_ms=50),
        kind="once",
        unit="chunk",
        tokens=100,
        ramp_s=1.0,
        wide=True,
    ),
    Scenario(
        name="slow-2000",
        title="2,000 slow streams (20 tokens/s, 5 s)",
        connections=2000,
        body=_stream(100, delay_ms=50),
        kind="once",
        unit="chunk",
        tokens=100,
        ramp_s=1.0,
        wide=True,
        # One agent takes at most 1,024 slots; the goal is the router's alone.
        without=frozenset({"agent"}),
    ),
    Scenario(name="prompt-256k", title="a 256 KB prompt, 4 connections", connections=4, body=_long_prompt),
    Scenario(name="image-8m", title="an 8 MB image, 1 connection", connections=1, body=_image),
)

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def quick() -> tuple[Scenario, ...]:
    """The smoke run: one of each kind, small."""
    slow = replace(
        BY_NAME["slow-500"],
        name="slow-100",
        title="100 slow streams (20 tokens/s, 1 s)",
        connections=100,
        body=_stream(20, delay_ms=50),
        tokens=20,
        ramp_s=0.3,
    )
    return (BY_NAME["short-8"], BY_NAME["stream-16"], slow, BY_NAME["image-8m"])


def model_for(scenario: Scenario, target_is_wide: bool) -> str:
    return fleet.WIDE_MODEL if scenario.wide and target_is_wide else fleet.MODEL
