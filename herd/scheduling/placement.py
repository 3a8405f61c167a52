"""Where a model that is to be pulled or loaded goes: the node with the most free memory that it fits. Pure.

Source: docs/behaviour.md, "Managing models". What is free changes until a pull has ended, so this is a good
guess and no promise; the node itself checks its disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from herd.fleet.snapshot import NodeView
from herd_node.protocol import wire

#: Beside the weights: context, buffers, and room for the system.
MEMORY_FACTOR = 1.2
#: What a pull must leave free on a disk.
DISK_REST_BYTES = 2 * 1024**3


class Site(NamedTuple):
    """One node as a place for models."""

    node_id: str
    offers: frozenset[str]
    """What its ready backends can do with models (`herd_node.models.manager.OFFERS`)."""
    memory_bytes: int | None
    """All that a model could ever have; None where the node does not say."""
    free_memory_bytes: int | None
    free_disk_bytes: int | None


class Choice(NamedTuple):
    """A node, or the reason why none."""

    node_id: str | None
    why_not: str = ""


def site(node: NodeView, beat: wire.Heartbeat) -> Site | None:
    """None while nothing can be sent there."""
    if node.status not in ("online", "degraded"):
        return None
    ready = [backend for backend in beat.backends if backend.ready]
    offers = frozenset(offer for backend in ready for offer in backend.manages)
    disks = [backend.disk_free_bytes for backend in ready if backend.disk_free_bytes is not None]
    disk = min(disks) if disks else beat.disk.free_bytes
    if node.gpu_total_bytes is not None:
        free = node.gpu_total_bytes - (node.gpu_used_bytes or 0)
        return Site(node.node_id, offers, node.gpu_total_bytes, free, disk)
    return Site(node.node_id, offers, node.memory_total_bytes, node.memory_available_bytes, disk)


def place(sites: Iterable[Site], offers: frozenset[str], size_bytes: int | None, what: str) -> Choice:
    """Of the sites that have one of `offers`: the one with the most free memory that fits.

    One that would have to evict comes after those with room; nothing fits where the weights exceed all of the
    memory. `size_bytes` None: not known, so nothing is excluded by it. `what` names the deed in a sentence.
    """
    able = [one for one in sites if one.offers & offers]
    if not able:
        return Choice(None, f"no node that is online can {what}")
    fitting = [one for one in able if _fits(one, size_bytes)]
    if not fitting:
        return Choice(None, f"no node has the memory and the disk for {_size(size_bytes)}")
    best = min(
        fitting, key=lambda one: (not _has_room(one, size_bytes), -(one.free_memory_bytes or 0), one.node_id)
    )
    return Choice(best.node_id)


def _fits(one: Site, size_bytes: int | None) -> bool:
    if size_bytes is None:
        return True
    if one.memory_bytes is not None and size_bytes > one.memory_bytes:
        return False
    return one.free_disk_bytes is None or one.free_disk_bytes >= size_bytes + DISK_REST_BYTES


def _has_room(one: Site, size_bytes: int | None) -> bool:
    if size_bytes is None or one.free_memory_bytes is None:
        return True
    return one.free_memory_bytes >= MEMORY_FACTOR * size_bytes


def _size(size_bytes: int | None) -> str:
    return "it" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"
