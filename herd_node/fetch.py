"""`python -m herd_node.fetch DIR`: put the small model into a folder, with a progress bar; print its path.

What `herd demo` runs first: the router may not reach into the agent, so it starts it, here as everywhere.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from herd_node.backends import small_model

_BAR_CHARS = 30


class Bar:
    """One line that grows on a terminal; a line every tenth elsewhere."""

    def __init__(self) -> None:
        self._last = ("", -1)
        self._open = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        steps = 100 if sys.stderr.isatty() else 10
        step = done * steps // total if total else 0
        if (stage, step) == self._last:
            return
        if self._last[0] not in ("", stage):
            self.end()
        self._last = (stage, step)
        share = f" {done / 1e6:6.1f} of {total / 1e6:.1f} MB" if total else ""
        if sys.stderr.isatty():
            filled = "#" * (step * _BAR_CHARS // steps)
            sys.stderr.write(f"\r  {stage:<12}[{filled:<{_BAR_CHARS}}]{share}")
            self._open = True
        else:
            sys.stderr.write(f"  {stage}{share}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._open:
            sys.stderr.write("\n")
            self._open = False


def main() -> int:
    """Exit code 0 and the file's path on standard output; 1 and one sentence on standard error."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m herd_node.fetch DIR\n")
        return 2
    bar = Bar()
    try:
        path = asyncio.run(small_model.fetch(Path(sys.argv[1]), bar))
    except small_model.FetchFailed as error:
        bar.end()
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        bar.end()
        sys.stderr.write("  stopped; the next run fetches what did not come whole\n")
        return 130
    bar.end()
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
