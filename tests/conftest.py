"""What every suite may use: the small real model, fetched once into the user's own data folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from herd_node.backends import small_model
from herd_node.runtime.paths import default_root

settings.register_profile("fast", max_examples=60, deadline=None)
settings.register_profile("deep", max_examples=5000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(scope="session")
def small_model_path() -> Path:
    """HERD_TEST_MODEL names another place; else the model lies where `herd demo` would put it."""
    named = os.environ.get("HERD_TEST_MODEL")
    if named:
        return Path(named)
    folder = default_root() / "models"
    if not small_model.is_there(folder):
        subprocess.run([sys.executable, "-m", "herd_node.fetch", str(folder)], check=True)
    return small_model.model_file(folder)
