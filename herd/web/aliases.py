"""Names that stand for a model of the fleet: `claude-*` → a local one (docs/behaviour.md, "Aliases").

A name that some node lists, or listed before a restart, is that model, whatever the table says. Of several
patterns that fit the first counts, and what an alias stands for is never looked up again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from herd_node.protocol.names import canonical

_MAX_KEPT = 4096


class Aliases:
    """The table of the settings. `known` says whether the fleet has a model of a canonical name."""

    def __init__(self, table: Mapping[str, str], known: Callable[[str], bool]) -> None:
        self._rows = [(pattern.lower(), target) for pattern, target in table.items()]
        self._known = known
        self._seen: dict[str, str | None] = {}

    def resolve(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The names under which a chain is sent, place by place; empty where none is an alias."""
        if not self._rows:
            return ()
        resolved = tuple(self._target(name) for name in asked)
        return () if resolved == asked else resolved

    def _target(self, name: str) -> str:
        if name not in self._seen:
            if len(self._seen) >= _MAX_KEPT:
                self._seen.clear()
            lower = name.lower()
            found = (target for pattern, target in self._rows if fnmatchcase(lower, pattern))
            self._seen[name] = next(found, None)
        target = self._seen[name]
        return name if target is None or self._known(canonical(name)) else target
