"""Fleets and requests as hypothesis draws them: small, unequal, and often in trouble."""

from __future__ import annotations

from hypothesis import strategies as st

from herd.fleet.snapshot import (
    ArrivalRate,
    BusyShare,
    FleetSnapshot,
    InstanceView,
    NodeView,
    Rates,
    Running,
    listing_of,
)
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling.plan import History, Waiting
from tests.scheduling.build import GB, NOW, ask, fleet, holding, instance, node, stats

MODELS = ("m", "n", "o")

seconds = st.floats(0.1, 60.0)
ago = st.floats(0.0, 100.0)
share = st.floats(0.0, 1.0)

rates = st.builds(
    Rates,
    prefill_tokens_per_s=st.floats(10.0, 5000.0),
    step_s=st.floats(0.002, 0.5),
    load_cold_s=seconds,
    load_warm_s=seconds,
)

_CHAIN = tuple(PrefixMark(bytes([n]), 40.0 * n) for n in range(1, 6))
prefixes = st.integers(0, 5).map(lambda n: _CHAIN[:n])


@st.composite
def runnings(draw: st.DrawFn) -> Running:
    started_s = NOW - draw(ago)
    first_s = None if draw(st.booleans()) else draw(st.floats(started_s, NOW))
    return Running("r", "m", started_s, first_s, draw(seconds), draw(st.floats(1.0, 500.0)))


@st.composite
def instances(draw: st.DrawFn, name: str) -> InstanceView:
    state = draw(st.sampled_from(("hot", "hot", "loading", "warm", "cold")))
    slots = draw(st.integers(1, 4))
    most = slots if state == "hot" else 1 if state == "loading" else 0
    return instance(
        name,
        state,
        slots=slots,
        running=tuple(draw(st.lists(runnings(), max_size=most))),
        settling_until_s=(NOW + 1.0,) if state == "hot" and draw(st.integers(0, 9)) == 0 else (),
        loading_since_s=NOW - draw(ago) if state == "loading" else None,
        rates=draw(rates),
        size_bytes=draw(st.sampled_from((None, GB, 4 * GB, 40 * GB))),
        context_tokens=draw(st.sampled_from((None, 128, 8192))),
        context_fixed=draw(st.integers(0, 5)) == 0,
        last_used_s=NOW - draw(ago),
        arrival_rate=ArrivalRate(draw(st.floats(0.0, 2.0)), NOW - draw(ago)),
        held=tuple(draw(st.lists(prefixes, max_size=2))) if state == "hot" else (),
        busy_until_s=NOW + 1.0 if draw(st.integers(0, 12)) == 0 else 0.0,
    )


@st.composite
def nodes(draw: st.DrawFn, node_id: str) -> NodeView:
    listed = draw(st.sets(st.sampled_from(MODELS), min_size=1))
    gpu = draw(st.sampled_from((None, 8 * GB, 24 * GB, 96 * GB)))
    held = [draw(instances(name)) for name in sorted(listed)]
    return node(
        node_id,
        *held,
        status=draw(st.sampled_from(("online",) * 6 + ("degraded", "offline", "draining"))),
        heat=draw(st.sampled_from((None, "nominal", "serious"))),
        paused=draw(st.integers(0, 12)) == 0,
        pressure=draw(st.sampled_from(("normal",) * 5 + ("critical",))),
        gpu_total_bytes=gpu,
        gpu_used_bytes=None if gpu is None else int(gpu * draw(share)),
        max_loaded=draw(st.sampled_from((None, 1, 2, 3))),
        busy_share=BusyShare(draw(share), NOW - draw(ago), any(x.running for x in held)),
        free_share=draw(st.floats(0.2, 1.0)),
        last_chosen_s=draw(st.sampled_from((0.0, 500.0, 999.0))),
    )


@st.composite
def worked(draw: st.DrawFn, view: NodeView) -> NodeView:
    """The same node after requests came, went, settled and taught it something; nothing else is new."""
    after = []
    for x in view.instances:
        most = {"hot": x.slots + 1, "loading": 1}.get(x.state, 0)
        work = {
            "rates": draw(st.sampled_from((x.rates, x.rates, draw(rates)))),
            "running": tuple(draw(st.lists(runnings(), max_size=most))),
            "settling_until_s": (NOW + 1.0,) if x.state == "hot" and draw(st.integers(0, 9)) == 0 else (),
            "arrival_rate": ArrivalRate(draw(st.floats(0.0, 2.0)), NOW),
            "last_used_s": NOW - draw(ago),
            "held": holding(*draw(st.lists(prefixes, max_size=2))) if x.state == "hot" else x.held,
        }
        after.append(x._replace(**work) if draw(st.booleans()) else x)
    busy = BusyShare(draw(share), NOW - draw(ago), any(x.running for x in after))
    return view._replace(instances=tuple(after), busy_share=busy, last_chosen_s=draw(st.floats(0.0, NOW)))


@st.composite
def fleets(draw: st.DrawFn, max_nodes: int = 6) -> FleetSnapshot:
    many = draw(st.integers(1, max_nodes))
    views = [draw(nodes(f"n{n}")) for n in range(many)]
    known = draw(st.dictionaries(st.sampled_from(MODELS), st.floats(1.0, 900.0)))
    waiting = draw(st.dictionaries(st.sampled_from(MODELS), st.integers(0, 3)))
    return fleet(*views, stats={name: stats(tokens) for name, tokens in known.items()}, waiting=waiting)


@st.composite
def requests(draw: st.DrawFn, request_id: str = "q") -> InferenceRequest:
    chain = draw(st.lists(st.sampled_from(MODELS), min_size=1, max_size=3, unique=True))
    return ask(
        *chain,
        tokens=draw(st.floats(0.0, 4000.0)),
        request_id=request_id,
        max_tokens=draw(st.sampled_from((None, 1, 400))),
        wanted_context_tokens=draw(st.sampled_from((None, None, 4096, 16384))),
        prefixes=draw(prefixes),
    )


@st.composite
def queues(draw: st.DrawFn, max_size: int = 8) -> list[Waiting]:
    entries = []
    for n in range(draw(st.integers(1, max_size))):
        waited_s = draw(st.sampled_from((0.0, 5.0, 11.0, 130.0, 301.0)))
        history = History(waited_s=waited_s, held_s=draw(st.sampled_from((0.0, 31.0))))
        deadline_s = NOW - waited_s + draw(st.floats(0.5, 200.0))
        entries.append(Waiting(draw(requests(f"q{n}")), history, NOW - waited_s, deadline_s))
    return entries


def with_node(snapshot: FleetSnapshot, view: NodeView) -> FleetSnapshot:
    """The same fleet with one node replaced, all its other views untouched."""
    nodes = {**snapshot.nodes, view.node_id: view}
    listing = listing_of(nodes.values())
    if listing == snapshot.listing:
        listing = snapshot.listing  # as the registry has it: the same until somebody lists something else
    return snapshot._replace(nodes=nodes, listing=listing)
