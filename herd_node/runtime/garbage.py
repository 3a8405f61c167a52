"""How often Python looks for objects that hold each other. Python's own habit is one for small programs.

All that a request makes is freed when it ends, without the collector: what holds each other is let go by hand
where a connection or a request ends. So the collector finds next to nothing, and each look costs time that
grows with the streams that run.
"""

from __future__ import annotations

import gc
from typing import Final

#: New objects before a look at the new ones; such looks before one at older ones; those before one at all.
_THRESHOLDS: Final = (5_000, 20, 10)


def look_seldom() -> None:
    """For the whole process: called by a program, never by a library."""
    gc.set_threshold(*_THRESHOLDS)
