"""The order of measuring. A round takes every scenario through every target, one right after the other.

Each other round goes through the targets backwards, so that neither a machine that grows warm nor a neighbour
that wakes up favours one of them; figures are compared within a round only, and the median of those ratios
counts (`goals`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine
from bench.build import Tools
from bench.errors import BenchError
from bench.scenarios import Scenario, model_for
from bench.targets import AGENT, DIRECT, ROUTER, Target

Progress = Callable[[str], None]


class Pace(NamedTuple):
    """How long, and how often."""

    rounds: int = 3
    seconds: float = 1.5
    warm_up_s: float = 0.4


class Cell(NamedTuple):
    """One scenario through one target, once. `figures` may be compared; `raw` is what was counted."""

    figures: Mapping[str, float]
    raw: Mapping[str, Any]


#: Target -> cell, of one scenario in one round.
Row = dict[str, Cell]
#: Scenario -> row.
Round = dict[str, Row]


class Bench:
    """Runs cells. One a bench; `folder` holds the requests."""

    def __init__(self, tools: Tools, folder: Path, pace: Pace, progress: Progress) -> None:
        self._tools = tools
        self._folder = folder
        self._pace = pace
        self._progress = progress

    def run(self, scenarios: Sequence[Scenario], targets: Sequence[Target]) -> list[Round]:
        """Every round, in order."""
        made = []
        for number in range(self._pace.rounds):
            order = targets if number % 2 == 0 else tuple(reversed(targets))
            made.append(self._round(number, scenarios, order))
        return made

    def _round(self, number: int, scenarios: Sequence[Scenario], targets: Sequence[Target]) -> Round:
        done: Round = {}
        for scenario in scenarios:
            row: Row = {}
            for target in targets:
                if target.name in scenario.without:
                    continue
                row[target.name] = self._cell(scenario, target)
                self._progress(
                    f"round {number + 1}/{self._pace.rounds}  {scenario.name:<12}"
                    f" {target.name:<7} {_line(row[target.name])}"
                )
            done[scenario.name] = _with_differences(row)
        return done

    def _cell(self, scenario: Scenario, target: Target) -> Cell:
        request = self._request_file(scenario, target)
        self._warm_up(scenario, target, request)
        how = ["--once", "--ramp-s", str(scenario.ramp_s)]
        if scenario.kind == "closed":
            how = ["--seconds", str(self._pace.seconds)]
        before = {part: machine.cpu_s([pid]) for part, pid in target.parts.items()}
        raw = self.load(scenario, target.port, request, *how)
        cpu_s = {part: machine.cpu_s([pid]) - before[part] for part, pid in target.parts.items()}
        return Cell(_figures(scenario, raw, cpu_s), {**raw, "cpu_by_part_s": cpu_s})

    def _warm_up(self, scenario: Scenario, target: Target, request: Path) -> None:
        """Connections, caches and code paths. Slow streams need none: each connection asks once."""
        if scenario.kind == "closed":
            self.load(scenario, target.port, request, "--seconds", str(self._pace.warm_up_s))

    def load(
        self, scenario: Scenario, port: int, request: Path, *how: str, limit_s: float | None = None
    ) -> dict[str, Any]:
        """One run of the load generator."""
        limit_s = limit_s or scenario.limit_s
        command = [str(self._tools.load), *how, "--port", str(port), "--request", str(request)]
        command += ["--connections", str(scenario.connections), "--records", str(scenario.records)]
        command += ["--limit-s", str(limit_s)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s + 30, check=False)
        if done.returncode != 0:
            raise BenchError(f"The load generator failed: {done.stderr.strip()}")
        raw: dict[str, Any] = json.loads(done.stdout)
        return raw

    def _request_file(self, scenario: Scenario, target: Target) -> Path:
        model = model_for(scenario, target.wide)
        path = self._folder / f"{scenario.name}-{model}.request"
        if not path.exists():
            path.write_bytes(scenario.request(model))
        return path


def _figures(scenario: Scenario, raw: Mapping[str, Any], cpu_s: Mapping[str, float]) -> dict[str, float]:
    """Durations in ms, CPU in µs a request or chunk."""
    seconds, requests = max(raw["seconds"], 1e-9), raw["requests"]
    units = raw["chunks"] if scenario.unit == "chunk" else requests
    figures = {"errors": float(raw["errors"]), "seconds": seconds, "per_s": units / seconds}
    for name in ("latency_ms", "ttft_ms"):
        for point, value in (raw[name] or {}).items():
            figures[f"{name}_{point}"] = value
    if cpu_s and units:
        figures["cpu_us"] = sum(cpu_s.values()) * 1e6 / units
        figures["cores"] = sum(cpu_s.values()) / seconds
        for part, part_s in cpu_s.items():
            figures[f"cpu_us_{part}"] = part_s * 1e6 / units
    return figures


def _with_differences(row: Row) -> Row:
    """What a target adds to going direct, and the agent to the router alone; of the same minute."""
    made: Row = {}
    for name, cell in row.items():
        figures = dict(cell.figures)
        _subtract(figures, row.get(DIRECT), "ttft_ms_p50", "ttft_added_ms")
        if name == AGENT:
            _subtract(figures, row.get(ROUTER), "latency_ms_p50", "hop_ms")
        made[name] = cell._replace(figures=figures)
    return made


def _subtract(figures: dict[str, float], base: Cell | None, figure: str, made: str) -> None:
    if base is not None and figure in figures and figure in base.figures:
        figures[made] = figures[figure] - base.figures[figure]


def _line(cell: Cell) -> str:
    figures = cell.figures
    parts = [f"{figures['per_s']:>9,.0f}/s"]
    if "cpu_us" in figures:
        parts.append(f"{figures['cpu_us']:>8.1f} µs CPU")
    if "latency_ms_p50" in figures:
        parts.append(f"p50 {figures['latency_ms_p50']:.2f} ms")
    if figures["errors"]:
        parts.append(f"{figures['errors']:.0f} ERRORS: {cell.raw['first_error']}")
    return "  ".join(parts)
