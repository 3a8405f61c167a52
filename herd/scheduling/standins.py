"""VRAM fallback: which loaded models may stand in for one that would have to be loaded.

Pure, and off unless the settings or the request ask for it (docs/scheduling.md §3). It only names them, in
the order in which they are to be tried: whether one can be sent to now is for `decide` to find out.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, log
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, ModelName
from herd.scheduling.bounds import holders_of
from herd.scheduling.categories import category_of, words_of
from herd.scheduling.context import is_resident
from herd.scheduling.eligibility import Needs, name_of
from herd.scheduling.rows import Row


class StandIn(NamedTuple):
    """Compared as a tuple: nearest in size first, of two that are as near the larger, then by name."""

    distance: float
    """|ln| of the ratio of the weights' sizes; infinity where one is not known."""
    smallness: int
    model: str


def is_cold(rows: list[Row], excluded: set[str]) -> bool:
    """No node that could take it has it loaded, or is loading it."""
    return not any(
        is_resident(row.instance)
        for row in rows
        if row.where is not None and row.node.node_id not in excluded
    )


def standins(needs: Needs, snapshot: FleetSnapshot) -> list[StandIn]:
    """Loaded models of the same category that can do all that it can, the best one first."""
    holders = [(one, name_of(one, needs.model)) for _, one in holders_of(needs.model, needs.only, snapshot)]
    names = [name for _, name in holders if name is not None]
    categories = {category_of(name) for name in names}
    known = [words for name in names if (words := words_of(name)) is not None]
    # nodes that say different things of it: whoever stands in must do what any of them could
    words = frozenset(needs.words).union(*known)
    if len(categories) != 1 or None in categories:
        return []
    [category] = categories
    size_bytes = next((one.size_bytes for one, _ in holders if one.size_bytes), None)
    own = frozenset([word for word in words if not word.startswith("/")])
    found: dict[str, StandIn] = {}
    for name, instance in _loaded(needs, snapshot):
        can = words_of(name)
        if can is None or not own <= can or category_of(name) != category:
            continue
        one = StandIn(_distance(size_bytes, instance), -(instance.size_bytes or 0), name.canonical)
        found[name.canonical] = min(one, found.get(name.canonical, one))
    return sorted(found.values())


def _loaded(needs: Needs, snapshot: FleetSnapshot) -> Iterator[tuple[ModelName, InstanceView]]:
    for node in snapshot.nodes.values():
        if needs.only is not None and node.node_id != needs.only:
            continue
        for instance in node.instances:
            if instance.state == "hot":
                for name in instance.names:
                    if name.canonical != needs.model:
                        yield name, instance


def _distance(size_bytes: int | None, instance: InstanceView) -> float:
    if not size_bytes or not instance.size_bytes:
        return inf
    return abs(log(instance.size_bytes / size_bytes))
