"""`herd status`, `nodes`, `models`, `ps`: four views of one answer, /fleet/status.

With `--json`: `status` prints the answer as it came; `nodes` `{"nodes": [...]}`, its node objects; `models`
and `ps` `{"models": [...]}`, one entry a model and node with the answer's fields and `node_id`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from herd.console import spelling
from herd.console.client import base_url, command, fleet_status, print_json
from herd.console.tables import Column, clean, table, terminal_width, write
from herd.web import human, overview

_NODES = (
    Column("NODE", flexible=True),
    Column("STATUS"),
    Column("BUSY", right=True),
    Column("CPU", right=True),
    Column("MEMORY"),
    Column("PRESSURE"),
    Column("HEAT"),
    Column("SEEN"),
    Column("BACKENDS", flexible=True, spare=True),
    Column("GPU", flexible=True, spare=True),
)
_STATUS_NODES = (
    Column("NODE", flexible=True),
    Column("STATUS"),
    Column("BUSY", right=True),
    Column("CPU", right=True),
    Column("PRESSURE"),
    Column("HOT MODELS", flexible=True),
)
_MODELS = (
    Column("MODEL", flexible=True),
    Column("STATE"),
    Column("SIZE", right=True),
    Column("CONTEXT", right=True),
    Column("BUSY", right=True),
    Column("WAITING", right=True),
    Column("NODES", flexible=True),
)
_LOADED = (
    Column("MODEL", flexible=True),
    Column("NODE", flexible=True),
    Column("STATE"),
    Column("SIZE", right=True),
    Column("CONTEXT", right=True),
    Column("BUSY", right=True),
)
_QUEUES = (Column("QUEUE", flexible=True), Column("WAITING", right=True), Column("OLDEST", right=True))


@command
def run_status(args: argparse.Namespace) -> int:
    """Totals, a line a node, and the queues."""
    status = fleet_status(args)
    if args.json:
        print_json(status)
        return 0
    nodes = overview.nodes(status)
    lines = [f"{base_url(args)}: {overview.totals(status)}"]
    rows = [
        (n.node_id, n.status, n.busy, n.cpu, n.pressure, ", ".join(n.hot) or human.UNKNOWN) for n in nodes
    ]
    if rows:
        lines += ["", *table(_STATUS_NODES, rows, terminal_width())]
    queues = [
        (model, str(queue["waiting"]), human.duration(queue.get("oldest_wait_s")))
        for model, queue in sorted(status.get("queues", {}).items())
    ]
    if queues:
        lines += ["", *table(_QUEUES, queues, terminal_width())]
    write([*lines, *_reasons(nodes)])
    return 0


@command
def run_nodes(args: argparse.Namespace) -> int:
    """Every node with the state of its machine; BUSY is requests in flight / slots of loaded models."""
    status = fleet_status(args)
    if args.json:
        print_json({"nodes": status["nodes"]})
        return 0
    nodes = overview.nodes(status)
    rows = [
        (n.node_id, n.status, n.busy, n.cpu, n.memory, n.pressure, n.heat, n.seen, n.backends, n.gpu)
        for n in nodes
    ]
    join = spelling.command("herd", "join", *spelling.in_folder(args.data_dir))
    nothing = f"No node has joined yet; `{join}` says how."
    _print(rows, _NODES, nothing, _reasons(nodes))
    return 0


@command
def run_models(args: argparse.Namespace) -> int:
    """Every model of the fleet, merged over the nodes that are there."""
    status = fleet_status(args)
    if args.json:
        print_json({"models": _entries(status, overview.STATES)})
        return 0
    rows = [
        (m.name, m.state, m.size, m.context, m.busy, str(m.waiting), _where(m.where))
        for m in overview.models(status)
    ]
    _print(rows, _MODELS, "No node that is there lists a model.")
    return 0


@command
def run_ps(args: argparse.Namespace) -> int:
    """What is loaded, and where."""
    status = fleet_status(args)
    if args.json:
        print_json({"models": _entries(status, overview.LOADED)})
        return 0
    rows = [(m.name, m.node_id, m.state, m.size, m.context, m.busy) for m in overview.loaded(status)]
    _print(rows, _LOADED, "No model is loaded anywhere.")
    return 0


def _print(
    rows: Sequence[Sequence[str]], columns: Sequence[Column], nothing: str, after: Sequence[str] = ()
) -> None:
    lines = table(columns, rows, terminal_width()) if rows else [nothing]
    write([*lines, *after])


def _reasons(nodes: Sequence[overview.NodeSummary]) -> list[str]:
    lines = [clean(f"{node.node_id}: {trouble}") for node in nodes for trouble in node.troubles]
    return ["", *lines] if lines else []


def _where(where: Sequence[tuple[str, str]]) -> str:
    return ", ".join(node_id if state == "cold" else f"{node_id} ({state})" for node_id, state in where)


def _entries(status: dict[str, Any], states: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"node_id": node["node_id"], **model}
        for node in status["nodes"]
        if node["status"] not in overview.GONE
        for model in node["models"]
        if model["state"] in states
    ]
