"""What a node's heat does to it. A node that reports no heat is taken to be cool: unknown is not hot."""

from __future__ import annotations

from typing import NamedTuple

from herd.fleet.snapshot import HeatState


class HeatEffect(NamedTuple):
    """`takes_work`: whether new work may go there. `free_share_ratio`: factor on its free share (0-1)."""

    takes_work: bool
    free_share_ratio: float


EFFECTS: dict[HeatState | None, HeatEffect] = {
    None: HeatEffect(True, 1.0),
    "nominal": HeatEffect(True, 1.0),
    "fair": HeatEffect(True, 1.0),
    "serious": HeatEffect(True, 0.5),
    "critical": HeatEffect(False, 0.5),
}


def effect(heat: HeatState | None) -> HeatEffect:
    """docs/scheduling.md §1: serious halves the free share, critical excludes; running work goes on."""
    return EFFECTS[heat]
