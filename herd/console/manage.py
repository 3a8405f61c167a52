"""`herd pull`, `rm`, `load`, `unload`: the models of the nodes, managed through the router on this machine.

With `--json`: `pull` prints its last progress line and the node, the others what the router answered.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from herd.console.client import command, post, post_for_events, print_json
from herd.console.tables import clean, terminal_width, write
from herd.errors import HerdError
from herd.web import human
from herd_node.runtime.clock import SystemClock

#: Silence of a node that checks gigabytes, or reads them into memory.
_QUIET_S: Final = 900.0
_BAR_CHARS: Final = 30
_REDRAW_S: Final = 0.1


class Progress:
    """One line that is written anew on a terminal; elsewhere a line a stage and every tenth."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._terminal = sys.stderr.isatty()
        self._drawn_s = 0.0
        self._last = ""
        self._open = False
        self._began: dict[str, tuple[float, int]] = {}

    def show(self, line: dict[str, Any]) -> None:
        status = clean(str(line.get("status", "")))
        total, done = line.get("total"), line.get("completed") or 0
        if not isinstance(total, int) or total <= 0:
            self._say(status)
            return
        if self._terminal:
            now_s = self._clock.now_s()
            if now_s - self._drawn_s < _REDRAW_S and done < total:
                return
            self._drawn_s = now_s
            self._draw(status, done, total, self._speed(str(line.get("digest")), done, now_s))
        else:
            self._say(f"{status} {10 * (10 * done // total)} % of {human.size(total)}")

    def end(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            self._open = False

    def _speed(self, layer: str, done: int, now_s: float) -> str:
        began_s, before = self._began.setdefault(layer, (now_s, done))
        passed_s = now_s - began_s
        return f" {human.size(round((done - before) / passed_s))}/s" if passed_s > 0.5 else ""

    def _draw(self, status: str, done: int, total: int, speed: str) -> None:
        filled = "#" * (_BAR_CHARS * done // total)
        text = f"{status} [{filled:<{_BAR_CHARS}}] {100 * done // total:3} % of {human.size(total)}{speed}"
        width = (terminal_width() or 80) - 1
        sys.stderr.write(f"\r{text[:width]:<{width}}")
        sys.stderr.flush()
        self._open = True
        self._last = status

    def _say(self, text: str) -> None:
        if text and text != self._last:
            self.end()
            sys.stderr.write(f"{text}\n")
            self._last = text


@command
def run_pull(args: argparse.Namespace) -> int:
    """Exit code 0 once the node has the model."""
    progress, last = Progress(), {}
    try:
        for line in post_for_events(args, "/dashboard/api/pull", _body(args), _QUIET_S):
            last = line
            if "error" in line:
                raise HerdError(f"The pull failed: {line['error']}.")
            progress.show(line)
    finally:
        progress.end()
    if last.get("status") != "success":
        raise HerdError("The pull ended without a result.")
    if args.json:
        print_json({"model": args.model, **last})
    return 0


@command
def run_rm(args: argparse.Namespace) -> int:
    return _tell(args, "delete", "deleted", "deleted from")


@command
def run_load(args: argparse.Namespace) -> int:
    return _tell(args, "load", "loaded", "loaded on")


@command
def run_unload(args: argparse.Namespace) -> int:
    return _tell(args, "unload", "unloaded", "unloaded from")


def _tell(args: argparse.Namespace, deed: str, key: str, sentence: str) -> int:
    answer = post(args, f"/dashboard/api/{deed}", _body(args), _QUIET_S)
    if args.json:
        print_json(answer)
        return 0
    nodes = answer.get(key, []) if isinstance(answer, dict) else []
    write([clean(f"{args.model} {sentence} {', '.join(map(str, nodes))}")])
    return 0


def _body(args: argparse.Namespace) -> dict[str, str]:
    body = {"model": args.model}
    if args.node:
        body["node_id"] = args.node
    return body
