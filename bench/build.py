"""The two C programs, built once a version of their sources and kept in the user's cache folder.

Binaries never lie in the tree. A compiler is `$CC`, `cc`, or the one inside the package `ziglang` from PyPI.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from bench.errors import BenchError

_SOURCES = Path(__file__).parent / "native"
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
_PATIENCE_S = 300.0


class Tools(NamedTuple):
    """Paths of the programs."""

    load: Path
    backend: Path


def build(cache: Path | None = None) -> Tools:
    """Compile what is not there yet. Raises BenchError."""
    if not sys.platform.startswith("linux"):
        raise BenchError(
            "The bench runs on Linux only: its load generator uses epoll, its figures come from /proc."
        )
    compiler = _compiler()
    digest = sha256(" ".join((*compiler, *_FLAGS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = (cache or _cache_folder()) / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return Tools(*(_built(compiler, folder, name) for name in Tools._fields))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "herd-bench"


def _compiler() -> tuple[str, ...]:
    if named := os.environ.get("CC"):
        return tuple(shlex.split(named))
    if found := shutil.which("cc"):
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "cc")
    raise BenchError(
        "The bench needs a C compiler: install one (cc), or `pip install ziglang` into this venv."
    )


def _built(compiler: tuple[str, ...], folder: Path, name: str) -> Path:
    program = folder / name
    if program.exists():
        return program
    with tempfile.TemporaryDirectory(dir=folder) as workshop:
        made = Path(workshop) / name
        command = [*compiler, *_FLAGS, "-o", str(made), str(_SOURCES / f"{name}.c")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BenchError(f"The compiler {compiler[0]} cannot be run: {error}.") from error
        if done.returncode != 0:
            raise BenchError(f"{name}.c does not compile with {' '.join(compiler)}:\n{done.stderr}")
        made.replace(program)  # whole or not at all: two benches may build at once
    return program
