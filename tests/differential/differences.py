"""What may differ between the two answers to a request: the rows of `allowed.toml`, and how they are applied.

Anything else that differs is a bug of router or agent. Values that are never the same twice are masked where
they stand, so that all bytes around them still count.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.differential.corpus import Case
from tests.differential.sides import Pair
from tests.router.kit import Answer

_TABLE = tomllib.loads((Path(__file__).parent / "allowed.toml").read_text("utf-8"))


class ValueRow(NamedTuple):
    """A value in an answer (or in the request, as the backend sees it): each group of the pattern."""

    name: str
    pattern: re.Pattern[bytes]
    reason: str


class AnswerRow(NamedTuple):
    """Another answer. `rows`: only for these requests; `keeps`: what is the same all the same."""

    name: str
    direct: frozenset[int]
    routed: frozenset[int]
    """Empty: the status is the same."""
    keeps: str
    rows: frozenset[str]
    reason: str

    def fits(self, case: Case, direct: Answer, routed: Answer) -> bool:
        if direct.status not in self.direct or routed.status not in (self.routed or {direct.status}):
            return False
        if self.rows and case.row not in self.rows:
            return False
        match self.keeps:
            case "sentence":
                return bool(_sentence(direct.body)) and _sentence(direct.body) == _sentence(routed.body)
            case "records":
                return _shared_start(direct.body, routed.body)
            case "end":
                return _shared_start(direct.body, routed.body) or _without_end(direct) == _without_end(routed)
            case "json":
                return _same_json(direct.body, routed.body)
        return True


VALUES = [
    ValueRow(row["name"], re.compile(row["pattern"].encode()), row["reason"]) for row in _TABLE["value"]
]
REQUEST_VALUES = [
    ValueRow(row["name"], re.compile(row["pattern"].encode()), row["reason"]) for row in _TABLE["request"]
]
ANSWERS = [
    AnswerRow(
        row["name"],
        frozenset(row["direct"]),
        frozenset(row.get("routed", ())),
        row["keeps"],
        frozenset(row.get("rows", ())),
        row["reason"],
    )
    for row in _TABLE["answer"]
]


@dataclass
class Tally:
    """What was compared so far, for the summary of the run."""

    requests: set[str] = field(default_factory=set)
    compared: Counter[str] = field(default_factory=Counter)
    identical: int = 0
    but_values: int = 0
    allowed: Counter[str] = field(default_factory=Counter)
    different: int = 0
    used: set[tuple[str, str]] = field(default_factory=set)
    """(row of allowed.toml, request): where it was needed."""

    def lines(self) -> list[str]:
        total = sum(self.compared.values())
        same = self.identical + self.but_values + self.different
        by_way = ", ".join(f"{count} {way}" for way, count in sorted(self.compared.items()))
        reasons = {row.name: row.reason for row in (*VALUES, *REQUEST_VALUES, *ANSWERS)}
        return [
            f"{len(self.requests)} requests of the corpus in {total} comparisons ({by_way})",
            f"{self.identical} answers identical to the byte, {self.but_values} but for ids and times, "
            f"{self.different} different as allowed, {total - same} by a bug; what was allowed how often:",
            *(f"{count:6d}  {name}: {reasons[name]}" for name, count in sorted(self.allowed.items())),
        ]


def judge(case: Case, pair: Pair, tally: Tally) -> None:
    """AssertionError with both sides when they differ and no row allows it."""
    tally.requests.add(case.row)
    tally.compared[f"{case.backend}, {case.way}"] += 1
    _check_requests(pair, tally)
    direct, routed = pair.direct, pair.routed
    one, other = _seen_by_a_client(direct), _seen_by_a_client(routed)
    if one == other:
        tally.identical += 1
        return
    if one[:2] == other[:2] and _mask(one[2], VALUES) == _mask(other[2], VALUES) and one[3] == other[3]:
        tally.allowed.update(_rows_that_differ(one[2], other[2]))
        tally.but_values += 1
        return
    row = next((row for row in ANSWERS if row.fits(case, direct, routed)), None)
    assert row is not None, explain(direct, routed)
    tally.different += 1
    tally.allowed[row.name] += 1
    tally.used.add((row.name, case.row))


def _check_requests(pair: Pair, tally: Tally) -> None:
    """The backend gets the caller's bytes, or (refused by router or agent) nothing."""
    if pair.seen_direct is None or not pair.seen_routed or pair.seen_direct == pair.seen_routed:
        return
    one, other = (
        [(path, _mask(body, REQUEST_VALUES)) for path, body in seen]
        for seen in (pair.seen_direct, pair.seen_routed)
    )
    assert one == other, f"the backend saw another request:\n  {one}\n  {other}"
    tally.allowed.update(row.name for row in REQUEST_VALUES)


def _seen_by_a_client(answer: Answer) -> tuple[int, str, bytes, bool]:
    return answer.status, answer.headers.get("content-type", ""), answer.body, answer.whole


def _mask(data: bytes, rows: list[ValueRow]) -> bytes:
    for row in rows:
        data = row.pattern.sub(_without_groups, data)
    return data


def _without_groups(found: re.Match[bytes]) -> bytes:
    whole, start = found[0], found.start()
    for group in range(found.re.groups, 0, -1):
        if found[group] is not None:
            begin, end = found.span(group)
            whole = whole[: begin - start] + b"~" + whole[end - start :]
    return whole


def _rows_that_differ(one: bytes, other: bytes) -> list[str]:
    return [row.name for row in VALUES if row.pattern.findall(one) != row.pattern.findall(other)]


def _sentence(body: bytes) -> str:
    """The sentence of an error, in whatever dialect."""
    try:
        value: Any = json.loads(body)
    except ValueError:
        return ""
    error = value.get("error") if isinstance(value, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""


def _shared_start(direct: bytes, routed: bytes) -> bool:
    """All that came before the ends is the same, record by record."""
    one, other = ([part for part in re.split(rb"\n+", body) if part] for body in (direct, routed))
    same = 0
    while same < min(len(one), len(other)) and _mask(one[same], VALUES) == _mask(other[same], VALUES):
        same += 1
    return same > 0 and max(len(one), len(other)) - same <= 2


def _without_end(answer: Answer) -> object:
    """An Ollama answer in one object, but for what says that it is complete."""
    value = json.loads(_mask(answer.body, VALUES).replace(b":~", b":0"))
    return {key: value[key] for key in value if key not in ("done", "done_reason")}


def _same_json(direct: bytes, routed: bytes) -> bool:
    one, other = (json.loads(_mask(body, VALUES).replace(b":~", b":0")) for body in (direct, routed))
    return bool(one == other)


def explain(direct: Answer, routed: Answer) -> str:
    """Where they part, record by record."""
    lines = [
        f"direct {direct.status} {direct.headers.get('content-type')} whole={direct.whole}",
        f"routed {routed.status} {routed.headers.get('content-type')} whole={routed.whole}",
    ]
    one, other = (_mask(answer.body, VALUES).split(b"\n") for answer in (direct, routed))
    for number in range(max(len(one), len(other))):
        left = one[number] if number < len(one) else None
        right = other[number] if number < len(other) else None
        if left != right:
            lines += [f"line {number}:", f"  direct {_short(left)}", f"  routed {_short(right)}"]
            break
    return "\n".join(lines)


def _short(line: bytes | None) -> str:
    return "nothing" if line is None else repr(line[:1500])
