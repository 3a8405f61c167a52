"""The faults that the fake backend can be told to have, and which request or connection each of them hits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

#: Faults of a connection, before a request was read.
ON_ACCEPT = frozenset({"rst_on_accept", "close_on_accept"})

#: Faults instead of an answer.
BEFORE_HEAD = frozenset(
    {
        "hang_before_headers",
        "close_before_headers",
        "rst_before_headers",
        "keepalive_race",
        "status",
        "queue_full",
        "model_missing",
        "redirect",
        "garbage_head",
        "header_bomb",
        "cl_and_te",
    }
)

#: Faults inside an answer, `after` so many tokens.
IN_BODY = frozenset(
    {
        "error_after_n",
        "rst_after_n",
        "fin_after_n",
        "clean_eof_after_n",
        "stall_after_n",
        "malformed_at",
        "bad_chunk_size",
    }
)

#: Answers that are unusual, but right (or nearly so).
MANNERS = frozenset(
    {
        "byte_drip",
        "split_utf8",
        "coalesce",
        "slow_tokens",
        "slow_load",
        "empty_done",
        "duplicate_done",
        "no_usage",
        "deaf",  # goes on although the client has left, as a llama-server may in the middle of a prompt
    }
)

KINDS = ON_ACCEPT | BEFORE_HEAD | IN_BODY | MANNERS


@dataclass(slots=True)
class Fault:
    """`skip` requests pass, the next `count` are hit (None: all of them). `path`: only requests to it."""

    kind: str
    skip: int = 0
    count: int | None = 1
    path: str | None = None
    after: int = 2
    status: int = 500
    body: str = '{"error":"injected"}'
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.05
    location: str = "http://127.0.0.1:1/"
    wait_s: float = 0.0
    """Silence before it happens, of `status` and `rst_before_headers`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such fault: {self.kind}")

    def hits(self) -> bool:
        """Counts one request, and says whether it is hit."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.count is None:
            return True
        self.count -= 1
        return self.count >= 0


def parse_fault(values: dict[str, object]) -> Fault:
    known = {field.name for field in fields(Fault)}
    unknown = values.keys() - known
    if unknown:
        raise ValueError(f"no such field of a fault: {', '.join(sorted(unknown))}")
    if "headers" in values:
        values = {**values, "headers": tuple((name, value) for name, value in values["headers"])}  # type: ignore[attr-defined]
    return Fault(**values)  # type: ignore[arg-type]


def pick(faults: Iterable[Fault], kinds: frozenset[str], path: str) -> Callable[[str], Fault | None]:
    """The faults of `kinds` that hit this request, asked for by kind. Call it once a request."""
    hit = {
        fault.kind: fault
        for fault in faults
        if fault.kind in kinds and fault.path in (None, path) and fault.hits()
    }
    return hit.get
