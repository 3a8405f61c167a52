"""The results as JSON, and as the tables between the two markers of bench/README.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.decision import Decision
from bench.errors import BenchError
from bench.goals import Result
from bench.memory import Memory
from bench.rounds import Pace, Round
from bench.scenarios import Scenario
from bench.targets import AGENT, PEERS, ROUTER, TITLES, Target

BEGIN, END = "<!-- bench: written by `python -m bench --readme` -->", "<!-- bench: end -->"
_MIB = 1 << 20

#: Figure -> (title, decimals). In this order in the tables.
_REQUEST_FIGURES = {
    "cpu_us": ("CPU µs a request", 0),
    "per_s": ("requests/s", 0),
    "latency_ms_p50": ("p50 ms", 2),
    "latency_ms_p99": ("p99 ms", 2),
}
_CHUNK_FIGURES = {
    "cpu_us": ("CPU µs a chunk", 2),
    "per_s": ("chunks/s", 0),
    "ttft_ms_p50": ("first token p50 ms", 2),
    "ttft_ms_p99": ("first token p99 ms", 2),
}


class Report(NamedTuple):
    """All that one run of the bench found."""

    command: str
    when: str
    machine: Mapping[str, object]
    pace: Pace
    scenarios: Sequence[Scenario]
    targets: Sequence[Target]
    rounds: Sequence[Round]
    decisions: Sequence[Decision]
    memory: Memory | None
    results: Sequence[Result]

    @property
    def error_count(self) -> int:
        return sum(
            int(cell.figures["errors"])
            for one in self.rounds
            for row in one.values()
            for cell in row.values()
        )


def as_json(report: Report) -> str:
    """Everything, raw counts of every cell included."""
    value: dict[str, Any] = {
        "command": report.command,
        "when": report.when,
        "machine": dict(report.machine),
        "pace": report.pace._asdict(),
        "versions": {target.name: target.version for target in report.targets if target.version},
        "goals": [result._asdict() for result in report.results],
        "decisions": [{**one._asdict(), "total_us": one.total_us} for one in report.decisions],
        "memory": None if report.memory is None else report.memory._asdict(),
        "rounds": [
            {
                scenario: {target: cell._asdict() for target, cell in row.items()}
                for scenario, row in one.items()
            }
            for one in report.rounds
        ],
    }
    return json.dumps(value, indent=1, default=dict) + "\n"


def as_markdown(report: Report) -> str:
    """Goals, then every scenario; medians over the rounds."""
    return "\n\n".join((_heading(report), _goals(report), _tables(report), _others(report)))


def into_readme(path: Path, markdown: str) -> None:
    """Replace what lies between the markers."""
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{path} has no place for the tables: the markers are missing.")
    path.write_text(f"{before}{BEGIN}\n{markdown}\n{END}{after}")


def _heading(report: Report) -> str:
    machine, pace = report.machine, report.pace
    versions = ", ".join(f"{TITLES[t.name]} {t.version}" for t in report.targets if t.version)
    rounds = f"{pace.rounds} round{'s' if pace.rounds > 1 else ''}"
    return (
        f"`{report.command}`, {report.when}: {machine['cores']} cores of {machine['cpu']}, Linux"
        f" {machine['kernel']}, Python {machine['python']}, load {machine['load_1m_at_start']} at the start;"
        f" {rounds}, cells of {pace.seconds:g} s after {pace.warm_up_s:g} s of warm-up."
        f"{f' Beside: {versions}.' if versions else ''}"
    )


def _goals(report: Report) -> str:
    rows = [(one.text, one.target, one.goal, one.actual, one.verdict) for one in report.results]
    return _table(("figure", "of", "goal", "actual", "verdict"), rows)


def _tables(report: Report) -> str:
    names = [target.name for target in report.targets]
    peers = [name for name in PEERS if name in names and ROUTER in names]
    head = ["scenario", "figure", *(TITLES[name] for name in names), *(f"÷ {TITLES[p]}" for p in peers)]
    rows: list[Sequence[str]] = []
    for scenario in report.scenarios:
        figures = _CHUNK_FIGURES if scenario.unit == "chunk" else _REQUEST_FIGURES
        for figure, (title, decimals) in figures.items():
            cells = [_cell(report, scenario.name, name, figure, decimals) for name in names]
            ratios = [_ratio(report, scenario.name, peer, figure) for peer in peers]
            rows.append((scenario.title, title, *cells, *ratios))
    note = (
        "The last columns: router alone divided by the peer, median of the ratios of each round."
        if peers
        else ""
    )
    return "\n\n".join(filter(None, (_table(head, rows), note)))


def _values(report: Report, scenario: str, target: str, figure: str) -> list[float]:
    cells = (one.get(scenario, {}).get(target) for one in report.rounds)
    return [cell.figures[figure] for cell in cells if cell is not None and figure in cell.figures]


def _median(report: Report, scenario: str, target: str, figure: str) -> float | None:
    values = _values(report, scenario, target, figure)
    return statistics.median(values) if values else None


def _cell(report: Report, scenario: str, target: str, figure: str, decimals: int) -> str:
    value = _median(report, scenario, target, figure)
    if value is None:
        return "–"
    shown = f"{value:,.{decimals}f}"
    if target == AGENT and figure == "cpu_us":
        parts = (_median(report, scenario, target, f"cpu_us_{part}") or 0.0 for part in ("router", "agent"))
        shown = f"{' + '.join(f'{part:,.{decimals}f}' for part in parts)} = {shown}"
    errors = sum(_values(report, scenario, target, "errors"))
    return f"{shown} ({errors:.0f} errors)" if errors else shown


def _ratio(report: Report, scenario: str, peer: str, figure: str) -> str:
    ratios = []
    for one in report.rounds:
        row = one.get(scenario, {})
        if ROUTER in row and peer in row:
            mine, other = row[ROUTER].figures.get(figure), row[peer].figures.get(figure)
            if mine is not None and other:
                ratios.append(mine / other)
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def _others(report: Report) -> str:
    rows = [
        (
            f"decision at {one.nodes:,} nodes, half of them free",
            f"{one.total_us:,.0f} µs ({one.snapshot_us:,.0f} snapshot + {one.plan_us:,.0f} plan)",
        )
        for one in report.decisions
    ]
    if (memory := report.memory) is not None:
        rows += [
            ("PSS of a fresh router", f"{memory.fresh_bytes / _MIB:.1f} MB"),
            ("the same with 8 nodes", f"{memory.with_nodes_bytes / _MIB:.1f} MB"),
            (f"the same after {memory.requests:,} requests", f"{memory.after_bytes / _MIB:.1f} MB"),
        ]
    return _table(("beside", "figure"), rows) if rows else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
