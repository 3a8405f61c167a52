"""The soft limit of open files is lifted, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
from herd_node.runtime.limits import raise_open_files
raise_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(("hard", "after"), [(256, 256), (1000, 1000), (4096, 4096)])
def test_the_soft_limit_rises_to_the_hard_one_and_no_further(hard: int, after: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(hard=hard)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == after
