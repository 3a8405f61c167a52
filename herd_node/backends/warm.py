"""Which weights were unloaded a short while ago: their file is probably still in the page cache.

Pure: the agent keeps the text of `dump` in its folder, so a restart of the agent forgets nothing. Wall time,
because it must survive that restart.
"""

from __future__ import annotations

import json
import math

WARM_FOR_S = 30 * 60.0


class WarmMemory:
    """Keys are `<backend id> <weights or name>`. `changed`: the agent writes the file, and resets it."""

    def __init__(self, unloaded_wall_s: dict[str, float] | None = None) -> None:
        self._unloaded_wall_s = dict(unloaded_wall_s or {})
        self._hot: dict[str, frozenset[str]] = {}
        self.changed = False

    def saw(self, backend: str, hot: frozenset[str], wall_s: float) -> None:
        """The keys of one backend that are loaded now; those gone since the last call were unloaded now."""
        for key in self._hot.get(backend, frozenset()) - hot:
            self._unloaded_wall_s[key] = wall_s
            self.changed = True
        self._hot[backend] = hot
        past = [
            key for key in self._unloaded_wall_s if key in hot or self.unloaded_s_ago(key, wall_s) is None
        ]
        for key in past:
            del self._unloaded_wall_s[key]
            self.changed = True

    def unloaded_s_ago(self, key: str, wall_s: float) -> float | None:
        """None: not known to be warm any more. A wall clock set back counts as just now."""
        at_s = self._unloaded_wall_s.get(key)
        if at_s is None or wall_s - at_s >= WARM_FOR_S:
            return None
        return max(0.0, wall_s - at_s)

    def dump(self) -> str:
        return json.dumps(self._unloaded_wall_s, sort_keys=True)

    @classmethod
    def parse(cls, text: str | bytes | None) -> WarmMemory:
        """Of what `dump` wrote; anything else is an empty memory (it is a hint, not a record)."""
        try:
            stored = json.loads(text) if text else {}
        except ValueError:
            stored = {}
        if not isinstance(stored, dict):
            return cls()
        return cls({key: float(at_s) for key, at_s in stored.items() if _is_time(at_s)})


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
