"""Instances: what a node's beats say of its models, merged by weights, and what runs in their slots.

An instance is a weights file on one backend of one node, under all its names (docs/scheduling.md §2).
`merge` is a pure function of one beat. `Instance` is the registry's own mutable record; nobody else holds
one, and what leaves the registry is its frozen view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp
from typing import Literal, NamedTuple

from herd.fleet.held import NOTHING_HELD, Held, PromptCache
from herd.fleet.snapshot import (
    INSTANCE_FIXED,
    NO_ARRIVALS,
    ArrivalRate,
    InstanceState,
    InstanceView,
    ModelName,
    Rates,
    Running,
)
from herd.request import PrefixMark
from herd_node.protocol import wire
from herd_node.protocol.names import canonical

#: How long ago a model may have been unloaded and still lie in the page cache.
WARM_S = 1800.0
ARRIVAL_TAU_S = 300.0
_ARRIVAL_PER_S = 1.0 / ARRIVAL_TAU_S
#: A beat may have been written before what we saw ourselves: for so long our own eyes count more.
EVIDENCE_S = 5.0
#: A load that we asked for is believed to go on for so many times its estimate, whatever the beats say.
LOAD_PATIENCE = 3.0

_ORDER: tuple[InstanceState, ...] = ("hot", "loading", "warm", "cold")


Work = tuple[Rates, tuple[Running, ...], tuple[float, ...], ArrivalRate, float, Held]


class Facts(NamedTuple):
    """What changes seldom. Equal facts of two beats mean that the instance was not touched."""

    backend_id: str
    backend_kind: str
    names: tuple[ModelName, ...]
    rates_key: str
    size_bytes: int | None
    parameters: int | None
    kv_bytes_per_token: int | None
    context_tokens: int | None
    context_train_tokens: int | None
    context_fixed: bool
    slots: int | None
    members: tuple[str, ...]


class Report(NamedTuple):
    """One instance in one beat: its facts, and what moves from beat to beat."""

    facts: Facts
    state: InstanceState
    unloaded_s_ago: float | None
    slots_taken: int | None


def merge(beat: wire.Heartbeat) -> dict[str, Report]:
    """The beat's models as instances, by key. A name that two backends have goes to the first backend."""
    rank = {backend.id: place for place, backend in enumerate(beat.backends)}
    groups: dict[str, list[wire.Model]] = {}
    for model in sorted(beat.models, key=lambda model: rank.get(model.backend, len(rank))):
        groups.setdefault(instance_key(model), []).append(model)
    kinds = {backend.id: backend.kind for backend in beat.backends}
    offered = {backend.id: backend.endpoints for backend in beat.backends}
    taken: set[str] = set()
    reports = {}
    for key, models in groups.items():
        names = _names(models, taken, offered.get(models[0].backend, ()))
        if names:
            reports[key] = _report(models, names, kinds.get(models[0].backend) or "openai")
    return reports


def instance_key(model: wire.Model) -> str:
    """Unique on a node: the backend, and the weights; where those are not known, the name stands alone."""
    if model.weights is not None:
        return f"{model.backend}|{model.weights}"
    return f"{model.backend}||{canonical(model.name)}"


def _names(models: list[wire.Model], taken: set[str], offered: tuple[str, ...]) -> tuple[ModelName, ...]:
    """`offered` are endpoints of the backend: what it lacks, none of its models can be asked for."""
    names = []
    for model in models:
        # no words at all stay none: nothing is known then, and nothing is excluded by it
        capabilities = frozenset((*model.capabilities, *offered)) if model.capabilities else frozenset()
        for shown in (model.name, *model.aliases):
            name = canonical(shown)
            if name not in taken:
                taken.add(name)
                names.append(
                    ModelName(canonical=name, shown=shown, capabilities=capabilities, family=model.family)
                )
    return tuple(names)


def _report(models: list[wire.Model], names: tuple[ModelName, ...], kind: str) -> Report:
    states = [_state(model) for model in models]
    state = min(states, key=_ORDER.index)
    main = models[states.index(state)]
    # The entry that is loaded speaks for all; what it does not know, another may.
    first = [main, *(model for model in models if model is not main)]
    weights = main.weights

    def known(field: Callable[[wire.Model], int | None]) -> int | None:
        return next((value for model in first if (value := field(model))), None)

    facts = Facts(
        backend_id=main.backend,
        backend_kind=kind,
        names=names,
        rates_key=weights if weights is not None else names[0].canonical,
        size_bytes=known(lambda model: model.size_bytes),
        parameters=known(lambda model: model.parameters),
        kv_bytes_per_token=known(lambda model: model.kv_bytes_per_token),
        context_tokens=main.context_tokens if state == "hot" or main.context_fixed else None,
        context_train_tokens=known(lambda model: model.context_train_tokens),
        context_fixed=main.context_fixed,
        slots=known(lambda model: model.slots),
        members=main.members,
    )
    return Report(facts, state, main.unloaded_s_ago, main.slots_taken)


def _state(model: wire.Model) -> InstanceState:
    if model.state in ("warm", "cold"):
        ago = model.unloaded_s_ago
        if ago is None:
            return model.state
        return "warm" if ago <= WARM_S else "cold"
    return model.state


class Instance:
    """One instance, as the registry keeps it. Counts are `len()` of `running` and `settling`."""

    __slots__ = (
        "arrival",
        "bad_until_s",
        "busy_until_s",
        "delisted",
        "facts",
        "fixed",
        "guess",
        "key",
        "last_used_s",
        "listed",
        "loading_since_s",
        "node_id",
        "place",
        "prompts",
        "rates",
        "reloads_from",
        "running",
        "seen_hot_s",
        "settling",
        "slots_taken",
        "state",
        "state_before_load",
        "view",
        "worked",
    )

    def __init__(self, node_id: str, key: str, report: Report, rates: Rates, guess: Rates) -> None:
        self.node_id = node_id
        self.key = key
        self.facts = report.facts
        self.state: InstanceState = report.state
        self.slots_taken = report.slots_taken
        self.guess = guess
        self.rates = rates
        self.running: dict[object, Running] = {}
        self.settling: dict[object, tuple[float, float]] = {}
        """Slots of cancelled requests: since when, and until when at the latest."""
        self.prompts = PromptCache()
        self.arrival = NO_ARRIVALS
        self.last_used_s = 0.0
        self.bad_until_s = 0.0
        self.busy_until_s = 0.0
        self.delisted: frozenset[str] = frozenset()
        self.listed = True
        self.loading_since_s: float | None = None
        self.state_before_load: Literal["cold", "warm"] | None = None
        """Set while we ourselves believe in a load, because we sent a request to a cold model."""
        self.seen_hot_s: float | None = None
        """When a record last proved it hot."""
        self.view: InstanceView | None = None
        self.fixed: tuple[object, ...] = ()
        """The first fields of `view`, which work does not change."""
        self.reloads_from: int | None = None
        """While it is loaded anew with another context: the one it had, which beats still tell of."""
        self.place = 0
        """In the `instances` of its node's view."""
        self.worked = False
        """Whether `view` is out of date in what work changes, and in nothing else."""

    def hear(self, report: Report, now_s: float) -> bool:
        """Take a beat's word, as far as nothing better is known; whether the instance is another one now."""
        before = (self.facts, self.state, self.listed, self.delisted)
        was_tokens = self.reloads_from
        if was_tokens is not None and report.facts.context_tokens == was_tokens and self.running:
            # the old runner is not gone yet
            facts = report.facts._replace(context_tokens=self.facts.context_tokens)
            report = report._replace(facts=facts, state="loading")
        self.facts, self.slots_taken = report.facts, report.slots_taken
        self.listed, self.delisted = True, frozenset()
        self._become(self._believed(report, now_s), now_s)
        return before != (self.facts, self.state, self.listed, self.delisted)

    def _believed(self, report: Report, now_s: float) -> InstanceState:
        said = report.state
        # 1. nobody calls a model hot that is not; a stale expiry or an absence from its list is no proof
        if said == "hot":
            return "hot"
        # 2. work in its slots says more than any beat
        if self.running:
            return "loading" if self.state in ("cold", "warm") else self.state
        # 3. a record proved it hot after the beat may have been written
        if self.seen_hot_s is not None and now_s - self.seen_hot_s < EVIDENCE_S:
            ago = report.unloaded_s_ago
            if ago is None or now_s - ago < self.seen_hot_s:
                return self.state
        # 4. our own load goes on though its caller left, for as long as one may take
        if self.loading_since_s is not None and self.state_before_load is not None:
            patience_s = LOAD_PATIENCE * self.load_estimate_s()
            if now_s - self.loading_since_s < patience_s:
                return "loading"
        # 5. the beat's word
        return said

    def load_estimate_s(self) -> float:
        warm = self.state_before_load == "warm"
        return self.rates.load_warm_s if warm else self.rates.load_cold_s

    def _become(self, state: InstanceState, now_s: float) -> None:
        if state == "loading":
            self.loading_since_s = self.loading_since_s if self.state == "loading" else now_s
        else:
            self.loading_since_s = None
            self.state_before_load = None
            self.reloads_from = None
        if self.state == "hot" and state != "hot":
            self.prompts.clear()
        self.state = state

    def start(self, token: object, running: Running, prefixes: tuple[PrefixMark, ...], slots: int) -> None:
        """A request goes in. A cold model is loading from here on: the next beat would say so too late."""
        now_s = running.started_s
        if self.state in ("cold", "warm"):
            before: Literal["cold", "warm"] = "warm" if self.state == "warm" else "cold"
            self._become("loading", now_s)
            self.state_before_load = before
        self.running[token] = running
        self.last_used_s = now_s
        self.arrival = arrived(self.arrival, now_s)
        if prefixes:
            self.prompts.add(prefixes, slots)

    def reloads(self, context_tokens: int | None, now_s: float) -> None:
        """A request is about to go in for which the backend loads it anew, with so much context."""
        self._become("loading", now_s)
        self.state_before_load = "warm"
        if context_tokens is not None:
            self.reloads_from = self.facts.context_tokens
            self.facts = self.facts._replace(context_tokens=context_tokens)

    def evicted(self, now_s: float) -> bool:
        """Another load takes its memory; whether that was news about the state."""
        if self.state != "hot" or self.running:
            return False
        self.seen_hot_s = None
        self._become("warm", now_s)
        return True

    def proved_hot(self, now_s: float) -> bool:
        """It answered; whether that was news about the state."""
        self.seen_hot_s = now_s
        if self.state == "hot":
            return False
        self._become("hot", now_s)
        return True

    def load_failed(self, now_s: float) -> bool:
        """The request that made us believe in a load failed; whether that was news about the state."""
        if self.state != "loading" or self.state_before_load is None or self.running:
            return False
        self._become(self.state_before_load, now_s)
        return True

    def forget_sequence(self, prefixes: tuple[PrefixMark, ...]) -> None:
        """It never got into the prompt cache."""
        self.prompts.remove(prefixes)

    def unlist(self) -> bool:
        """The node does not list it any more; work in its slots stays. Whether anything of it was changed."""
        changed = self.listed or self.prompts.held is not NOTHING_HELD
        self.listed = False
        self.prompts.clear()
        return changed

    @property
    def occupied(self) -> bool:
        return bool(self.running or self.settling)

    def shown_names(self) -> tuple[ModelName, ...]:
        if not self.listed:
            return ()
        if self.delisted:
            return tuple(name for name in self.facts.names if name.canonical not in self.delisted)
        return self.facts.names

    def slots(self, defaults: Mapping[str, int]) -> int:
        """A model that is not loaded has one slot: its load is one thing, done for one request."""
        if self.state != "hot":
            return 1
        return self.loaded_slots(defaults)

    def loaded_slots(self, defaults: Mapping[str, int]) -> int:
        return self.facts.slots or defaults.get(self.facts.backend_kind, 1)

    def current_view(self, defaults: Mapping[str, int]) -> InstanceView:
        """The same object until it is touched; only the last fields are others after work came or went."""
        view = self.view
        if view is None:
            view = self.view = self._make_view(defaults)
            self.fixed = view[:INSTANCE_FIXED]
        elif self.worked:
            view = self.view = tuple.__new__(InstanceView, self.fixed + self._work())
        self.worked = False
        return view

    def _make_view(self, defaults: Mapping[str, int]) -> InstanceView:
        facts = self.facts
        return InstanceView(
            self.node_id,
            facts.backend_id,
            facts.backend_kind,
            self.key,
            self.shown_names(),
            self.state,
            self.slots(defaults),
            self.loading_since_s,
            self.load_estimate_s() if self.state == "loading" else None,
            facts.size_bytes,
            facts.kv_bytes_per_token,
            facts.context_tokens,
            facts.context_train_tokens,
            facts.context_fixed,
            facts.members or (self.node_id,),
            self.bad_until_s,
            self.busy_until_s,
            *self._work(),
        )

    def _work(self) -> Work:
        """The last fields of a view, in their order."""
        settling = self.settling
        return (
            self.rates,
            tuple(self.running.values()),
            tuple([until_s for _, until_s in settling.values()]) if settling else (),
            self.arrival,
            self.last_used_s,
            self.prompts.held,
        )


def arrived(rate: ArrivalRate, now_s: float) -> ArrivalRate:
    """One more arrival in a rate whose memory is 300 s."""
    per_s, at_s = rate
    faded = per_s * exp((at_s - now_s) / ARRIVAL_TAU_S) if now_s > at_s else per_s
    return tuple.__new__(ArrivalRate, (faded + _ARRIVAL_PER_S, now_s))
