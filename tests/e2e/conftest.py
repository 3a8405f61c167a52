"""Fleets for the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kit import Fleet

MODEL = "smollm2:135m"


@pytest.fixture(scope="module")
def real_fleet(tmp_path_factory: pytest.TempPathFactory, small_model_path: Path) -> Iterator[Fleet]:
    """A router and two agents `a` and `b`, each with a real llama.cpp server."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        for node_id in ("a", "b"):
            fleet.start_agent(node_id, "--embedded", "--model", str(small_model_path))
        fleet.until_online("a", "b", model=MODEL)
        yield fleet
    finally:
        fleet.close()
