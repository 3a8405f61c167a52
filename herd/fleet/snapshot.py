"""Frozen views of the fleet, as the scheduler sees it.

`registry` makes a new view of a node or an instance only when that node or instance changed, so a view's
identity is a version: whoever derives something from a view may keep it for as long as the view is the same
object. In both kinds of view what work changes comes last, after what only beats, marks and states change:
the first part of two views is compared in one go. Time-dependent values are kept as the instants they depend
on, never as remaining seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
    family: str | None = None
    """The architecture, as its backend calls it."""


class InstanceView(NamedTuple):
    """The unit that is scored and filled: a weights file on a backend of a node (docs/scheduling.md §2).

    Made anew at every start and end of a request, so it is the cheapest kind of frozen value; and so is
    `NodeView`. Read by field name only.
    """

    node_id: str
    backend_id: str
    backend_kind: str
    key: str
    """Unique on its node; stable while the node lists it."""
    names: tuple[ModelName, ...]
    state: InstanceState
    slots: int
    loading_since_s: float | None
    loading_expected_s: float | None
    """How long the load in progress should take in all (it may have been warm); None: `rates.load_cold_s`."""
    size_bytes: int | None
    kv_bytes_per_token: int | None
    context_tokens: int | None
    """Context of one slot as loaded; None when not loaded or not known."""
    context_train_tokens: int | None
    context_fixed: bool
    members: tuple[str, ...]
    bad_until_s: float
    """Could not be loaded here; not tried again before."""
    busy_until_s: float
    """The node itself said busy; not sent to before."""
    # From here on: what a request that starts or ends changes.
    rates: Rates
    running: tuple[Running, ...] = ()
    settling_until_s: tuple[float, ...] = ()
    """Slots that a cancelled request still occupies, until these instants at the latest."""
    arrival_rate: ArrivalRate = NO_ARRIVALS
    last_used_s: float = 0.0
    held: Held = NOTHING_HELD
    """Sequences believed to lie in its prompt cache."""

    @property
    def taken(self) -> int:
        """Slots that are not free: running and settling."""
        return len(self.running) + len(self.settling_until_s)


#: So many fields of an `InstanceView` stay as they are while requests come and go.
INSTANCE_FIXED = InstanceView._fields.index("rates")


class NodeView(NamedTuple):
    """One node."""

    node_id: str
    status: NodeStatus
    last_beat_s: float
    reason: str | None = None
    agent_version: str | None = None
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
    free_share: float = 1.0
    """The capacity learner's predicted free share; 1.0 on a dedicated machine."""
    online_since_s: float = 0.0
    # From here on: what a request that starts or ends changes.
    instances: tuple[InstanceView, ...] = ()
    busy_share: BusyShare = NEVER_BUSY
    last_chosen_s: float = 0.0


#: So many fields of a `NodeView` stay as they are while requests come and go.
NODE_FIXED = NodeView._fields.index("instances")


class ModelStats(NamedTuple):
    """What is known of a model, wherever it runs."""

    out_tokens: float = 150.0
    """EWMA of completion tokens."""
    token_correction: float = 1.0
    """EWMA of real prompt tokens ÷ estimated."""


DEFAULT_STATS = ModelStats()

Holder = tuple[NodeView, InstanceView]
Listing = Mapping[str, tuple[tuple[str, int], ...]]
"""Model -> (node id, place in the node's `instances`) of everybody who lists it."""


class Holders(Mapping[str, tuple[Holder, ...]]):
    """Every known (node, instance) that has a name. Looked up when asked for: nobody asks for all names."""

    __slots__ = ("_listing", "_nodes")

    def __init__(self, nodes: Mapping[str, NodeView], listing: Listing) -> None:
        self._nodes = nodes
        self._listing = listing

    def __getitem__(self, model: str) -> tuple[Holder, ...]:
        nodes = self._nodes
        return tuple([(nodes[node_id], nodes[node_id].instances[at]) for node_id, at in self._listing[model]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._listing)

    def __len__(self) -> int:
        return len(self._listing)


Worked = tuple[Mapping[str, NodeView], Mapping[str, NodeView], tuple[str, ...]]
"""Between two `nodes`, the earlier one first, only the views of these node ids differ, and only in what work
changes."""


class FleetSnapshot(NamedTuple):
    """The fleet at one instant. A name has at most one instance on a node.

    `listing` is the same object as long as every node lists what it listed, and there is no new node.
    """

    nodes: Mapping[str, NodeView]
    listing: Listing
    remembered: Mapping[str, frozenset[str]] = MappingProxyType({})
    """Model -> node ids that listed it before a restart and have not been heard since."""
    stats: Mapping[str, ModelStats] = MappingProxyType({})
    waiting: Mapping[str, int] = MappingProxyType({})
    """Requests waiting or held in the router, by model."""
    any_online: bool = False
    last_sent_s: Mapping[str, float] = MappingProxyType({})
    """Model -> instant of the last attempt, for the starvation guard."""
    worked: Worked | None = None
    """How `nodes` came from earlier ones, if by work alone. It saves a comparison, no more."""

    @property
    def holders(self) -> Holders:
        """`holders[model]` lists every known (node, instance) that has the name."""
        return Holders(self.nodes, self.listing)


def listed_names(view: NodeView) -> tuple[tuple[str, int], ...]:
    """(canonical name, place in `instances`) of all that a node lists."""
    return tuple(
        [(name.canonical, at) for at, instance in enumerate(view.instances) for name in instance.names]
    )


def listing_of(views: Iterable[NodeView]) -> Listing:
    """The listing of a whole fleet, from nothing; `views.Views` keeps the same up to date."""
    listing: dict[str, tuple[tuple[str, int], ...]] = {}
    for view in views:
        for name, at in listed_names(view):
            listing[name] = (*listing.get(name, ()), (view.node_id, at))
    return listing
