"""Child processes that always end: each in a group of its own, the group ended whatever happened.

A Ctrl-C reaches the bench alone, which then ends every group in order; nothing is left running.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.errors import BenchError

_TERM_S = 6.0
_LOOK_S = 0.05


class Program:
    """One running program; what it prints lies in `log`. A context manager: its end is the program's."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        pipe_output: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._file = log.open("ab")
        # Settings of the person who runs the bench must not leak into what is measured.
        clean = {key: value for key, value in os.environ.items() if not key.startswith("FLEET_")}
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,  # some of ours end when it closes, however we ended
                stdout=subprocess.PIPE if pipe_output else self._file,
                stderr=self._file,
                env={**clean, **(env or {})},
                start_new_session=True,
            )
        except OSError as error:
            self._file.close()
            raise BenchError(f"{name} cannot be started: {error}.") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def first_line(self) -> str:
        """What it prints first, with `pipe_output`."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode().strip()

    def check(self) -> None:
        """Raises BenchError if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise BenchError(f"{self.name} ended by itself (exit code {code}): {self.last_words()}")

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-1500:].strip() or "it said nothing"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """SIGTERM to the group, SIGKILL to what is left of it."""
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(_TERM_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self._file.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def free_port() -> int:
    """A port that is free now, and not likely to be given to somebody's outgoing connection soon."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until(true: Callable[[], bool], what: str, *programs: Program, patience_s: float = 30.0) -> None:
    """Look again and again. Raises BenchError when a program ends, or the time does."""
    tick = threading.Event()
    for _ in range(int(patience_s / _LOOK_S)):
        for program in programs:
            program.check()
        if true():
            return
        tick.wait(_LOOK_S)
    words = "; ".join(f"{program.name} said: {program.last_words()}" for program in programs)
    raise BenchError(f"Waited {patience_s:.0f} s in vain for {what}. {words}")
