"""Commands that are printed can be run as they stand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from herd.console import spelling

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts stand in for the programs")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "a venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("herd", "herd-node"):
        (folder / name).write_text(f"#!/bin/sh\necho I am {name} $@\n")
        (folder / name).chmod(0o755)
    return folder


def run(command: str, **more: object) -> str:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command, shell=True, capture_output=True, text=True, check=True, timeout=10, **more
    ).stdout


def test_a_program_that_is_not_on_path_is_named_with_its_folder(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(programs / "herd")])
    assert run(spelling.command("herd-node", "--join", "-")) == "I am herd-node --join -\n"
    assert run(spelling.command("herd", "join")) == "I am herd join\n"


def test_a_program_on_path_keeps_its_plain_name(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", [str(programs / "herd")])
    assert spelling.command("herd", "join") == "herd join"


def test_a_program_called_from_its_own_folder_works_there(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(programs)
    monkeypatch.setattr(sys, "argv", ["herd"])
    assert run(spelling.command("herd"), cwd=programs) == "I am herd\n"


def test_python_minus_m_falls_back_to_what_is_installed_beside_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "herd" / "__main__.py")])
    monkeypatch.setenv("PATH", str(tmp_path))
    words = spelling.command("herd", "status").split()
    assert shutil.which(words[0]) is not None
