"""Fixtures of the backends' tests: the small real model, fetched once into the user's own data folder."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from herd_node.backends import small_model
from herd_node.runtime.paths import default_root


@pytest.fixture(scope="session")
def small_model_path() -> Path:
    named = os.environ.get("HERD_TEST_MODEL")
    if named:
        return Path(named)
    folder = default_root() / "models"
    return asyncio.run(small_model.fetch(folder, lambda stage, done, total: None))
