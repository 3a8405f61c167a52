"""The collector looks seldom, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
before = gc.get_threshold()
from herd_node.runtime.garbage import look_seldom
assert gc.get_threshold() == before, "importing is not asking for it"
look_seldom()
print(gc.isenabled(), *gc.get_threshold())
"""


def test_it_looks_seldom_and_still_looks() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "5000", "20", "10"]
