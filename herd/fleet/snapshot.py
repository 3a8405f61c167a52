"""Frozen views of the fleet, as the scheduler sees it.

`registry` makes a new view of a node or an instance only when that node or instance changed, so a view's
identity is a version: whoever derives something from a view may keep it for as long as the view is the same
object. Time-dependent values are kept as the instants they depend on, never as remaining seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

from herd.fleet.held import NOTHING_HELD, Held

NodeStatus = Literal["pending", "online", "degraded", "offline", "draining"]
InstanceState = Literal["hot", "loading", "warm", "cold"]
Pressure = Literal["normal", "warn", "critical"]
HeatState = Literal["nominal", "fair", "serious", "critical"]


class Running(NamedTuple):
    """One request in a slot, as the router itself knows it."""

    request_id: str
    model: str
    started_s: float
    first_record_s: float | None
    prefill_s: float
    """Expected prefill (`p` of scheduling.md §1) when it was sent."""
    out_tokens: float
    """Expected completion tokens when it was sent."""


class Rates(NamedTuple):
    """Speeds of one (node, model): learned where possible, first guesses otherwise; never None, never 0."""

    prefill_tokens_per_s: float
    step_s: float
    """Seconds a completion token."""
    load_cold_s: float
    load_warm_s: float


class BusyShare(NamedTuple):
    """EWMA of the share of time in which the node had work, and the instant it was brought up to date."""

    value: float
    at_s: float
    busy_now: bool


class ArrivalRate(NamedTuple):
    """EWMA of requests a second for one instance on one node (time constant 300 s)."""

    per_s: float
    at_s: float


NEVER_BUSY = BusyShare(0.0, 0.0, False)
NO_ARRIVALS = ArrivalRate(0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelName:
    """One name of an instance. Names made from one weights file share the instance."""

    canonical: str
    shown: str
    capabilities: frozenset[str]


class InstanceView(NamedTuple):
    """The unit that is scored and filled: a weights file on a backend of a node (docs/scheduling.md §2).

    Made anew at every start and end of a request, so it is the cheapest kind of frozen value; and so is
    `NodeView`. Written and read by field name only.
    """

    node_id: str
    backend_id: str
    backend_kind: str
    key: str
    """Unique on its node; stable while the node lists it."""
    names: tuple[ModelName, ...]
    state: InstanceState
    slots: int
    rates: Rates
    running: tuple[Running, ...] = ()
    settling_until_s: tuple[float, ...] = ()
    """Slots that a cancelled request still occupies, until these instants at the latest."""
    loading_since_s: float | None = None
    loading_expected_s: float | None = None
    """How long the load in progress should take in all (it may have been warm); None: `rates.load_cold_s`."""
    arrival_rate: ArrivalRate = NO_ARRIVALS
    size_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    context_tokens: int | None = None
    """Context of one slot as loaded; None when not loaded or not known."""
    context_train_tokens: int | None = None
    context_fixed: bool = False
    last_used_s: float = 0.0
    members: tuple[str, ...] = ()
    held: Held = NOTHING_HELD
    """Sequences believed to lie in its prompt cache."""
    bad_until_s: float = 0.0
    """Could not be loaded here; not tried again before."""
    busy_until_s: float = 0.0
    """The node itself said busy; not sent to before."""

    @property
    def taken(self) -> int:
        """Slots that are not free: running and settling."""
        return len(self.running) + len(self.settling_until_s)


class NodeView(NamedTuple):
    """One node. `not_sendable` is one reason word when nothing may be sent there now, else None."""

    node_id: str
    status: NodeStatus
    last_beat_s: float
    reason: str | None = None
    agent_version: str | None = None
    instances: tuple[InstanceView, ...] = ()
    backends_ready: Mapping[str, bool] = MappingProxyType({})
    pressure: Pressure = "normal"
    heat: HeatState | None = None
    paused: bool = False
    breaker_open_until_s: float = 0.0
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    gpu_total_bytes: int | None = None
    """Sum over GPUs (unified memory: the usable share); None on a machine without GPU."""
    gpu_used_bytes: int | None = None
    max_loaded: int | None = None
    """Most models its backend keeps loaded; None = no limit known."""
    busy_share: BusyShare = NEVER_BUSY
    free_share: float = 1.0
    """The capacity learner's predicted free share; 1.0 on a dedicated machine."""
    last_chosen_s: float = 0.0
    online_since_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStats:
    """What is known of a model, wherever it runs."""

    out_tokens: float = 150.0
    """EWMA of completion tokens."""
    token_correction: float = 1.0
    """EWMA of real prompt tokens ÷ estimated."""


DEFAULT_STATS = ModelStats()


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSnapshot:
    """The fleet at one instant. `holders[model]` lists every known (node, instance) that has the name.

    A name has at most one instance on a node.
    """

    nodes: Mapping[str, NodeView]
    holders: Mapping[str, tuple[tuple[NodeView, InstanceView], ...]]
    remembered: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Model -> node ids that listed it before a restart and have not been heard since."""
    stats: Mapping[str, ModelStats] = field(default_factory=dict)
    waiting: Mapping[str, int] = field(default_factory=dict)
    """Requests waiting or held in the router, by model."""
    any_online: bool = False
    last_sent_s: Mapping[str, float] = field(default_factory=dict)
    """Model -> instant of the last attempt, for the starvation guard."""
