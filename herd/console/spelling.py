"""Commands that we print are spelled so that they can be run: as this program itself was called.

A program in a virtual environment that is not activated is not on PATH, so a bare name would not work.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from herd_node.runtime.paths import default_root


def command(name: str, *arguments: str) -> str:
    """`herd` or `herd-node` on this machine, with arguments, quoted for its shell."""
    return join_words([*_program(name, Path(sys.argv[0])), *arguments])


def in_folder(data_dir: Path) -> tuple[str, ...]:
    """`--data-dir DIR` for a folder that is not the usual one: without it a command asks another herd."""
    return () if data_dir == default_root() else ("--data-dir", str(data_dir))


def join_words(words: list[str]) -> str:
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def _program(name: str, called: Path) -> list[str]:
    """1. It is on PATH, the same file. 2. It lies where we were called from. 3. Through the interpreter."""
    suffix = ".exe" if sys.platform == "win32" else ""
    beside = called.with_name(name + suffix)
    on_path = shutil.which(name)
    if on_path is not None and beside.exists() and Path(on_path).resolve() == beside.resolve():
        return [name]
    if called.name.startswith("herd") and beside.exists():
        return [_with_folder(beside)]
    installed = Path(sys.executable).with_name(name + suffix)
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-m", name.replace("-", "_")]


def _with_folder(path: Path) -> str:
    """A shell looks a bare name up on PATH, so a file of this folder needs its dot."""
    text = str(path)
    return text if path.parent != Path() else f".{'/' if sys.platform != 'win32' else chr(92)}{text}"
