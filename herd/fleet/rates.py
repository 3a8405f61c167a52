"""How fast each node runs each model, and how long each model's answers are: first guesses, then learned.

A rate is learned only from a request that ran alone on its node (docs/scheduling.md §1): what several
requests cost each other is the planner's business, and would be counted twice. Kept over restarts as plain
rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isnan
from typing import Literal, NamedTuple

from herd.fleet.hardware import BUS_BYTES_PER_S, DISK_BYTES_PER_S, Machine
from herd.fleet.snapshot import DEFAULT_STATS, ModelStats, Rates

Quantity = Literal[
    "prefill_tokens_per_s", "step_s", "load_cold_s", "load_warm_s", "out_tokens", "token_correction"
]

#: Weight of a new observation.
WEIGHTS: dict[Quantity, float] = {
    "prefill_tokens_per_s": 0.2,
    "step_s": 0.2,
    "load_cold_s": 0.4,
    "load_warm_s": 0.4,
    "out_tokens": 0.05,
    "token_correction": 0.2,
}
#: What a value may be: an estimate divides by it, so a broken clock or counter must not make it 0 or endless.
BOUNDS: dict[str, tuple[float, float]] = {
    "prefill_tokens_per_s": (0.1, 1e7),
    "step_s": (1e-5, 100.0),
    "load_cold_s": (0.01, 3600.0),
    "load_warm_s": (0.01, 3600.0),
    "out_tokens": (1.0, 1e6),
    "token_correction": (0.2, 5.0),
}
EMBEDDING_STATS = ModelStats(out_tokens=1.0)

_MIN_PREFILL_TOKENS = 100
_MIN_PREFILL_S = 0.03
_MIN_STEP_TOKENS = 8
_MIN_LOAD_S = 0.05
_LOAD_BASE_S = 1.2
_STEP_BASE_S = 0.003
_BANDWIDTH_RATIO = 0.75
#: Bytes a parameter of the usual 4-bit quantisations, and the usual model, where a node does not say.
_BYTES_PER_PARAMETER = 0.56
_USUAL_PARAMETERS = 8e9


class Sample(NamedTuple):
    """One successful request that ran alone, in seconds and tokens; None where it is not known."""

    uncached_tokens: float | None
    prefill_s: float | None
    completion_tokens: float | None
    decode_s: float | None
    load_s: float | None
    loaded_from: Literal["cold", "warm"] | None


class RateRow(NamedTuple):
    """One learned value. `node_id` is "" where it belongs to the model alone."""

    node_id: str
    model: str
    quantity: str
    value: float


def first_guess(machine: Machine, size_bytes: int | None, parameters: int | None) -> Rates:
    """Rates of a model on a machine that has not run it yet (docs/scheduling.md §1)."""
    if not size_bytes:
        size_bytes = int((parameters or _USUAL_PARAMETERS) * _BYTES_PER_PARAMETER)
    count = parameters or size_bytes / _BYTES_PER_PARAMETER
    return Rates(
        prefill_tokens_per_s=machine.flops / (2 * count),
        step_s=_STEP_BASE_S + size_bytes / (_BANDWIDTH_RATIO * machine.bandwidth_bytes_per_s),
        load_cold_s=_LOAD_BASE_S + size_bytes / DISK_BYTES_PER_S,
        load_warm_s=_LOAD_BASE_S + size_bytes / BUS_BYTES_PER_S,
    )


class LearnedRates:
    """Learned values by (node, model, quantity). `model`: the weights' name, else the canonical name."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str, str], float] = {}
        self._stats: dict[str, ModelStats] = {}
        self._written: dict[tuple[str, str, str], float] = {}
        """As they were when `take_dirty` was last asked, a few times a minute."""

    def rates(self, node_id: str, model: str, guess: Rates) -> Rates:
        """Learned where possible, else the guess."""
        value = self._values
        return Rates(
            value.get((node_id, model, "prefill_tokens_per_s"), guess.prefill_tokens_per_s),
            value.get((node_id, model, "step_s"), guess.step_s),
            value.get((node_id, model, "load_cold_s"), guess.load_cold_s),
            value.get((node_id, model, "load_warm_s"), guess.load_warm_s),
        )

    def stats(self, model: str) -> ModelStats | None:
        """What was learned of a model (canonical name), wherever it ran; None before the first answer."""
        return self._stats.get(model)

    def learn(self, node_id: str, model: str, sample: Sample, guess: Rates) -> bool:
        """Take one sample in; whether anything was learned from it."""
        learned = False
        tokens, seconds = sample.uncached_tokens, sample.prefill_s
        if tokens and seconds and tokens > _MIN_PREFILL_TOKENS and seconds > _MIN_PREFILL_S:
            start = guess.prefill_tokens_per_s
            learned |= self._mix(node_id, model, "prefill_tokens_per_s", tokens / seconds, start)
        tokens, seconds = sample.completion_tokens, sample.decode_s
        if tokens and seconds and tokens > _MIN_STEP_TOKENS and seconds > 0:
            # The clock of a decode starts at the first token.
            learned |= self._mix(node_id, model, "step_s", seconds / (tokens - 1), guess.step_s)
        if sample.load_s is not None and sample.load_s > _MIN_LOAD_S:
            if sample.loaded_from == "cold":
                learned |= self._mix(node_id, model, "load_cold_s", sample.load_s, guess.load_cold_s)
            elif sample.loaded_from == "warm":
                learned |= self._mix(node_id, model, "load_warm_s", sample.load_s, guess.load_warm_s)
        return learned

    def learn_answer(
        self, model: str, completion_tokens: float, prompt_tokens: float, est_tokens: float
    ) -> ModelStats | None:
        """What every completed answer teaches, 0 where it did not say; what is known of the model then.

        The mean length of its answers; and real ÷ estimated prompt tokens, where `est_tokens` is the estimate
        before any correction.
        """
        stats = self._stats.get(model)
        out_tokens, correction = stats or DEFAULT_STATS
        if completion_tokens > 0:
            out_tokens = _mixed("out_tokens", completion_tokens, out_tokens)
            self._values["", model, "out_tokens"] = out_tokens
        if prompt_tokens > 0 and est_tokens > 0:
            correction = _mixed("token_correction", prompt_tokens / est_tokens, correction)
            self._values["", model, "token_correction"] = correction
        elif not completion_tokens > 0:
            return stats
        stats = self._stats[model] = tuple.__new__(ModelStats, (out_tokens, correction))
        return stats

    def export(self) -> list[RateRow]:
        """Every learned value."""
        return [RateRow(*key, value) for key, value in self._values.items()]

    def take_dirty(self) -> list[RateRow]:
        """The values that changed since the last call, to be written."""
        written = self._written
        rows = [RateRow(*key, value) for key, value in self._values.items() if written.get(key) != value]
        written.update(self._values)
        return rows

    def load(self, rows: Iterable[tuple[str, str, str, float]]) -> None:
        """Take rows of an earlier run; a row that no longer means anything is left out."""
        for node_id, model, quantity, value in rows:
            bounds = BOUNDS.get(quantity)
            if bounds is None or not bounds[0] <= value <= bounds[1]:
                continue
            self._values[node_id, model, quantity] = self._written[node_id, model, quantity] = value
            if not node_id:
                self._refresh_stats(model)

    def _mix(self, node_id: str, model: str, quantity: Quantity, seen: float, start: float) -> bool:
        if isnan(seen):
            return False
        key = (node_id, model, quantity)
        self._values[key] = _mixed(quantity, seen, self._values.get(key, start))
        return True

    def _refresh_stats(self, model: str) -> None:
        value = self._values
        self._stats[model] = ModelStats(
            value.get(("", model, "out_tokens"), DEFAULT_STATS.out_tokens),
            value.get(("", model, "token_correction"), DEFAULT_STATS.token_correction),
        )


def _mixed(quantity: Quantity, seen: float, old: float) -> float:
    low, high = BOUNDS[quantity]
    bounded = low if seen < low else high if seen > high else seen
    return old + WEIGHTS[quantity] * (bounded - old)
