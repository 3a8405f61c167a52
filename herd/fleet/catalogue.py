"""The models of the fleet, merged over its nodes; `/api/tags`, `/api/ps`, `/v1/models` are made of it. Pure.

Cold models are listed, those of offline nodes are not. Details are those of the node that has the model hot,
else of the first by id.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from herd.fleet.snapshot import NodeView
from herd_node.protocol import wire
from herd_node.protocol.names import canonical

_LISTED = ("online", "degraded", "draining")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model as clients see it. `shown` is the first spelling in alphabetical order."""

    shown: str
    canonical: str
    model: wire.Model
    backend_kind: str
    nodes: tuple[str, ...]
    hot_nodes: tuple[str, ...]


def catalogue(beats: Iterable[tuple[NodeView, wire.Heartbeat]]) -> tuple[Entry, ...]:
    """Every listed model, by shown name."""
    found: dict[str, list[tuple[str, bool, str, wire.Model, str]]] = {}
    for view, beat in beats:
        if view.status not in _LISTED:
            continue
        hot = {name.canonical for one in view.instances if one.state == "hot" for name in one.names}
        known = {name.canonical for one in view.instances for name in one.names}
        kinds = {backend.id: backend.kind or "openai" for backend in beat.backends}
        for model in beat.models:
            for shown in (model.name, *model.aliases):
                name = canonical(shown)
                if name in known:
                    row = (view.node_id, name in hot, shown, model, kinds.get(model.backend, "openai"))
                    found.setdefault(name, []).append(row)
    return tuple(sorted((_entry(name, rows) for name, rows in found.items()), key=lambda entry: entry.shown))


def _entry(name: str, rows: list[tuple[str, bool, str, wire.Model, str]]) -> Entry:
    _, _, _, model, kind = next((row for row in rows if row[1]), rows[0])
    return Entry(
        shown=min(row[2] for row in rows),
        canonical=name,
        model=model,
        backend_kind=kind,
        nodes=tuple(dict.fromkeys(row[0] for row in rows)),
        hot_nodes=tuple(dict.fromkeys(row[0] for row in rows if row[1])),
    )
