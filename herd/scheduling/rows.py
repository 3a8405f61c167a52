"""What is kept between decisions: how each holder of a model stands, row by row, while its views stay.

`make_row` is the plain way, a pure function from nothing. `next_row` is the short way to the same row after
nothing but work came or went, which is what happens thousands of times a second. `CostTable` remembers rows;
it is the one mutable thing of this package, and a decision without one is the same, only slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate, compress, count
from operator import is_not
from typing import NamedTuple

from herd.fleet.snapshot import (
    INSTANCE_FIXED,
    NODE_FIXED,
    FleetSnapshot,
    InstanceView,
    Listing,
    NodeView,
)
from herd.scheduling.eligibility import Needs, Reason, why_not
from herd.scheduling.estimate import is_waited_for
from herd.scheduling.policy import Policy
from herd.scheduling.standing import (
    Line,
    Standing,
    after_claims,
    after_work,
    is_plain,
    line_of,
    standing,
)
from herd.trace import Exclusion

#: A row that has this share of its time left is made anew with those that have none: all at once is cheaper.
_RENEW_SHARE = 0.5
_NEVER_S = float("inf")


class Row(NamedTuple):
    """What is kept of one (node, instance): a reason against it, or how it stands."""

    node: NodeView
    instance: InstanceView
    where: Standing | None
    line: Line | None
    exclusion: Exclusion | None
    victims_waited: tuple[bool, ...]
    plain: bool
    """`next_row` may take the short way."""
    made_s: float
    expires_s: float


def make_row(
    node: NodeView,
    instance: InstanceView,
    needs: Needs,
    snapshot: FleetSnapshot,
    policy: Policy,
    now_s: float,
) -> Row:
    found = why_not(node, instance, needs, policy, now_s)
    if found is not None:
        # Whether an offline node still beats is a matter of time too.
        expires_s = min(found[1], now_s + policy.row_age_s)
        exclusion = Exclusion(node.node_id, found[0].value)
        return Row(node, instance, None, None, exclusion, (), False, now_s, expires_s)
    wanted = needs.wanted_context_tokens
    where = standing(node, instance, wanted, snapshot.waiting, policy, now_s)
    waited = tuple([is_waited_for(x, snapshot.waiting) for x in where.victims.idle])
    expires_s = now_s + policy.row_age_s if where.steady else now_s
    plain = is_plain(where, wanted, policy)
    return Row(node, instance, where, line_of(where), None, waited, plain, now_s, expires_s)


def next_row(
    row: Row,
    node: NodeView,
    instance: InstanceView,
    needs: Needs,
    snapshot: FleetSnapshot,
    policy: Policy,
    now_s: float,
    only_work: bool,
) -> Row:
    """`make_row`, if need be: nothing that excludes a loaded model comes from work, and marks only end.

    `only_work`: it is known that the views differ in nothing else; otherwise they are compared.
    """
    if only_work or _differ_in_work_only(row, node, instance):
        after = row_after_work(row, node, instance, policy, now_s)
        if after is not None:
            return after
    return make_row(node, instance, needs, snapshot, policy, now_s)


def row_after_work(
    row: Row, node: NodeView, instance: InstanceView, policy: Policy, now_s: float
) -> Row | None:
    """The short way, for views that differ in work only; None where there is none."""
    _, _, where, _, _, _, plain, made_s, _ = row
    if not plain or where is None or now_s < made_s or instance.settling_until_s:
        return None
    where, line = after_work(where, node, instance, policy, now_s)
    after = (node, instance, where, line, None, (), True, now_s, now_s + policy.row_age_s)
    return tuple.__new__(Row, after)  # past the generated constructor: a few times a request


def _differ_in_work_only(row: Row, node: NodeView, instance: InstanceView) -> bool:
    before = row.instance
    return (instance is before or instance[:INSTANCE_FIXED] == before[:INSTANCE_FIXED]) and node[
        :NODE_FIXED
    ] == row.node[:NODE_FIXED]


def is_fresh(row: Row, snapshot: FleetSnapshot, now_s: float, spare_s: float = 0.0) -> bool:
    """Whether a row of the same two views still says how things stand, and will for `spare_s`."""
    if not (row.made_s <= now_s < row.expires_s - spare_s or now_s == row.made_s):
        return False
    if not row.victims_waited or row.where is None:
        return True
    waiting = snapshot.waiting
    return row.victims_waited == tuple([is_waited_for(x, waiting) for x in row.where.victims.idle])


def is_restless(row: Row) -> bool:
    """It runs by the clock, or depends on who waits: no row of it is kept unseen."""
    return not row.plain and (row.expires_s <= row.made_s or bool(row.victims_waited))


class Kept:
    """The rows of one `Needs`, and what is the same for every decision over them."""

    __slots__ = (
        "_after",
        "_at_of",
        "_needs",
        "_nodes",
        "_places",
        "_restless",
        "_until_s",
        "excluded",
        "fastest_step_s",
        "from_s",
        "ids",
        "line_at",
        "lines",
        "places_by_key",
        "rows",
        "some_late",
    )

    def __init__(self, needs: Needs) -> None:
        self._needs = needs
        self._places: tuple[tuple[str, int], ...] = ()
        self._at_of: dict[str, int] = {}
        self._nodes: object = None
        self._restless: list[int] = []
        self._after: dict[int, tuple[Line, float, Line]] = {}
        self._until_s = float("-inf")
        self.from_s = float("-inf")
        self.ids: tuple[str, ...] = ()
        self.rows: list[Row] = []
        """One a holder of the model, in the order of the listing."""
        self.lines: list[Line] = []
        """Those of all rows that are not excluded."""
        self.line_at: list[int] = []
        """Place of a row's line in `lines`; meaningless for those that are excluded."""
        self.places_by_key: dict[tuple[str, str], int] = {}
        """(node id, instance key) -> place in `rows`."""
        self.excluded: tuple[Exclusion, ...] = ()
        """Those that are left out whatever the request, by node id."""
        self.fastest_step_s = _NEVER_S
        self.some_late = False

    def bring_up_to(self, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> None:
        """1 nothing changed and nothing ended by time; 2 some nodes changed; 3 each row is looked at.

        Few rows are fresh for other reasons than these two; they are looked at every time.
        """
        nodes, places = snapshot.nodes, snapshot.listing.get(self._needs.model, ())
        if places is not self._places or not self.from_s <= now_s < self._until_s:
            self._look_at_each(places, snapshot, policy, now_s)  # 3
        else:
            if nodes is not self._nodes:
                self._look_at_changed(snapshot, policy, now_s)  # 2
            if self._restless:
                self._look_at_restless(snapshot, policy, now_s)
        self._nodes = nodes

    def line_after(self, at: int, line: Line, claims: int, now_s: float) -> Line:
        """That of row `at`, whose own is `line`, for somebody who comes after so many claims.

        In a plan each request comes after one claim more than the one before it: the line after fewer is
        kept for this instant, and the next one made from it.
        """
        of, at_s, after = self._after.get(at, (None, now_s, line))
        if of is not line or at_s != now_s or after[-1].claims > claims:
            after = line
        if after[-1].claims != claims:
            after = after_claims(after, claims, now_s)
            self._after[at] = (line, now_s, after)
        return after

    def _look_at_changed(self, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> None:
        nodes, worked = snapshot.nodes, snapshot.worked
        self.from_s = now_s
        if worked is not None and worked[0] is self._nodes and worked[1] is nodes:
            changed, only_work = self._look_at_worked(nodes, worked[2], policy, now_s), True
            if not changed:
                return
        else:
            views = map(nodes.__getitem__, self.ids)
            changed = list(compress(count(), map(is_not, views, [row.node for row in self.rows])))
            only_work = False
        rows, needs, places, ids = self.rows, self._needs, self._places, self.ids
        sums_hold = rates_hold = True
        for at in changed:
            node, before = nodes[ids[at]], rows[at]
            instance = node.instances[places[at][1]]
            row = rows[at] = next_row(before, node, instance, needs, snapshot, policy, now_s, only_work)
            if instance.key is not before.instance.key:
                self._index()  # another weights file under the same name
            if row.line is None or not (before.plain and row.plain) or row.expires_s < self._until_s:
                sums_hold = False
                continue
            self.lines[self.line_at[at]] = row.line
            if before.instance.rates is not row.instance.rates:
                rates_hold = False
        if not sums_hold:
            self._sum_up()
        elif not rates_hold:
            self.fastest_step_s = self._fastest_step_s()

    def _look_at_worked(
        self, nodes: Mapping[str, NodeView], node_ids: Iterable[str], policy: Policy, now_s: float
    ) -> list[int]:
        """Rows of nodes where only work came or went, by the short way; the places of those that have none.

        All that is the same for every decision stays as it is, but for the fastest step.
        """
        rows, at_of, places, others = self.rows, self._at_of, self._places, []
        rates_hold = True
        for node_id in node_ids:
            at = at_of.get(node_id)
            if at is None:
                continue
            node, before = nodes[node_id], rows[at]
            instance = node.instances[places[at][1]]
            row = row_after_work(before, node, instance, policy, now_s)
            if row is None or row.line is None:
                others.append(at)
                continue
            rows[at], self.lines[self.line_at[at]] = row, row.line
            if before.instance.rates is not instance.rates:
                rates_hold = False
        if not rates_hold:
            self.fastest_step_s = self._fastest_step_s()
        return others

    def _look_at_restless(self, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> None:
        stale = [at for at in self._restless if not is_fresh(self.rows[at], snapshot, now_s)]
        for at in stale:
            row = self.rows[at]
            self.rows[at] = make_row(row.node, row.instance, self._needs, snapshot, policy, now_s)
        self.from_s = now_s
        if stale:
            self._sum_up()

    def _look_at_each(
        self, places: tuple[tuple[str, int], ...], snapshot: FleetSnapshot, policy: Policy, now_s: float
    ) -> None:
        nodes, needs, known = snapshot.nodes, self._needs, {row.node.node_id: row for row in self.rows}
        spare_s = policy.row_age_s * _RENEW_SHARE
        rows = []
        for node_id, at in places:
            node = nodes[node_id]
            instance, row = node.instances[at], known.get(node_id)
            if row is None:
                row = make_row(node, instance, needs, snapshot, policy, now_s)
            elif (
                row.instance is not instance
                or row.node is not node
                or not is_fresh(row, snapshot, now_s, spare_s)
            ):
                row = next_row(row, node, instance, needs, snapshot, policy, now_s, False)
            rows.append(row)
        self.rows = rows
        if places is not self._places:
            self._places, self.ids = places, tuple([node_id for node_id, _ in places])
            self._at_of = {node_id: at for at, node_id in enumerate(self.ids)}
            self._after.clear()
        self._index()
        self.from_s = now_s
        self._sum_up()

    def _index(self) -> None:
        self.places_by_key = {(row.node.node_id, row.instance.key): at for at, row in enumerate(self.rows)}

    def _fastest_step_s(self) -> float:
        return min(
            [row.instance.rates.step_s for row in self.rows if row.exclusion is None], default=_NEVER_S
        )

    def _sum_up(self) -> None:
        rows = self.rows
        self.lines = [row.line for row in rows if row.line is not None]
        self.line_at = list(accumulate([row.line is not None for row in rows], initial=0))
        self.excluded = tuple(sorted([row.exclusion for row in rows if row.exclusion is not None]))
        self.fastest_step_s = self._fastest_step_s()
        self.some_late = any([row.where is not None and row.where.late for row in rows])
        self._restless = [at for at, row in enumerate(rows) if is_restless(row)]
        steady = [row.expires_s for row in rows if not is_restless(row)]
        self._until_s = min(steady, default=_NEVER_S)


class CostTable:
    """Rows by needs. Owned by the shell and handed in; it serves one policy."""

    def __init__(self, max_needs: int = 256) -> None:
        self._max_needs = max_needs
        self._kept: dict[Needs, Kept] = {}
        self._absent: dict[str, tuple[Listing, object, tuple[Exclusion, ...]]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def look(self, needs: Needs, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> Kept:
        """Every holder of the model, as it stands now. Valid until the next look."""
        kept = self._kept.get(needs)
        if kept is None:
            if len(self._kept) >= self._max_needs:
                # What a caller may choose freely (num_ctx) is part of the key, so the oldest goes.
                del self._kept[next(iter(self._kept))]
            kept = self._kept[needs] = Kept(needs)
        kept.bring_up_to(snapshot, policy, now_s)
        return kept

    def absent(self, model: str, snapshot: FleetSnapshot) -> tuple[Exclusion, ...]:
        """Those that had the model before a restart, then the nodes that do not list it; each by id."""
        known = self._absent.get(model)
        if known is not None and known[0] is snapshot.listing and known[1] is snapshot.remembered:
            return known[2]
        nodes = snapshot.nodes
        gone = sorted(snapshot.remembered.get(model, frozenset()) - nodes.keys())
        others = sorted(nodes.keys() - {node_id for node_id, _ in snapshot.listing.get(model, ())})
        found = (
            *[Exclusion(node_id, Reason.OFFLINE.value) for node_id in gone],
            *[Exclusion(node_id, Reason.MODEL_ABSENT.value) for node_id in others],
        )
        if known is None and len(self._absent) >= self._max_needs:
            del self._absent[next(iter(self._absent))]
        self._absent[model] = (snapshot.listing, snapshot.remembered, found)
        return found
