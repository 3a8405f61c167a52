"""Pulls that run now, for people: what is pulled to which node, how far it is, how long it will take.

Fed with the progress lines as they go by. Knows nothing of nodes, HTTP or who asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson

from herd_node.protocol.framing import FramingError, Records

_MAX_STATUS_CHARS = 120


class Pull:
    """One pull. Layers come one after the other, so its total grows while it runs."""

    def __init__(self, node_id: str, model: str, started_s: float) -> None:
        self.node_id = node_id
        self.model = model
        self.started_s = started_s
        self.status = "starting"
        self.error: str | None = None
        self.ok = False
        """The line that says so has come."""
        self._layers: dict[str, tuple[int, int]] = {}
        self._records = Records("ndjson")

    @property
    def completed_bytes(self) -> int:
        return sum(completed for completed, _ in self._layers.values())

    @property
    def total_bytes(self) -> int:
        return sum(total for _, total in self._layers.values())

    @property
    def percent(self) -> int:
        """The last line of a layer may stay short of its end."""
        if self.ok:
            return 100
        return 100 * self.completed_bytes // self.total_bytes if self.total_bytes else 0

    def rest_s(self, now_s: float) -> float | None:
        """Expected time left at the mean speed so far; None while that says nothing."""
        passed_s, done = now_s - self.started_s, self.completed_bytes
        if passed_s < 1.0 or not done:
            return None
        return passed_s * (self.total_bytes - done) / done

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """Bytes of the node's answer; the lines that they completed."""
        try:
            found = self._records.feed(piece)
        except FramingError:
            self.error = "the node sent a line that cannot be read"
            return []
        return [line for record in found if (line := self._note(record)) is not None]

    def end(self) -> list[dict[str, Any]]:
        """The answer has ended: what a last line without its line end says."""
        rest = self._records.rest()
        line = self._note(rest) if rest else None
        return [] if line is None else [line]

    def _note(self, record: bytes) -> dict[str, Any] | None:
        try:
            line = orjson.loads(record)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(line, dict):
            return None
        if line.get("error"):
            self.error = str(line["error"])
        status = line.get("status")
        if isinstance(status, str):
            self.status = status[:_MAX_STATUS_CHARS]
            self.ok = status == "success"
        digest, total, completed = line.get("digest"), line.get("total"), line.get("completed", 0)
        if isinstance(digest, str) and isinstance(total, int) and isinstance(completed, int):
            self._layers[digest] = (completed, total)
        return line

    def as_dict(self, now_s: float) -> dict[str, object]:
        """For `/fleet/status` and the dashboard."""
        rest_s = self.rest_s(now_s)
        return {
            "node_id": self.node_id,
            "model": self.model,
            "status": self.status,
            "completed_bytes": self.completed_bytes,
            "total_bytes": self.total_bytes,
            "percent": self.percent,
            "running_s": round(now_s - self.started_s, 1),
            "eta_s": None if rest_s is None else round(rest_s, 1),
        }


class Pulls:
    """The ones that run."""

    def __init__(self) -> None:
        self._running: list[Pull] = []

    def __iter__(self) -> Iterator[Pull]:
        return iter(self._running)

    @contextmanager
    def one(self, node_id: str, model: str, now_s: float) -> Iterator[Pull]:
        pull = Pull(node_id, model, now_s)
        self._running.append(pull)
        try:
            yield pull
        finally:
            self._running.remove(pull)
