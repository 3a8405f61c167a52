"""The one way in which the bench ends before its time."""

from __future__ import annotations


class BenchError(Exception):
    """It cannot go on; `str()` is one sentence for people."""
