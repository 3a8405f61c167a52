"""Where log lines go: one JSON-lines file a process, rotated daily, and a console that a person can read.

Modules only call `logging.getLogger(__name__)`; the programs call `setup` once. Lines never carry prompt text
(nobody hands it over), and a join token that slips into a message is cut out of it here.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path
from typing import Literal, cast

Console = Literal["quiet", "full", "none"]

_OURS = ("herd", "herd_node")
#: They speak at INFO of every request, or at DEBUG with whole statements and headers.
_TALKATIVE = (
    "asyncio",
    "httpcore",
    "httpx",
    "uvicorn",
    "uvicorn.access",
    "uvicorn.error",
    "zeroconf",
)
_KEPT_FILES = 30
_TOKEN = re.compile(r"herd1_[A-Za-z0-9_=-]{8,}")
_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}
#: Control characters could move the cursor or recolour the terminal of whoever reads along.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_PLAIN = "\x1b[0m"
_MOST_KEYS = 1000


class Closer:
    """Undoes one `setup`."""

    def __init__(self, handlers: list[logging.Handler], levels: dict[str, int]) -> None:
        self._handlers = handlers
        self._levels = levels

    def close(self) -> None:
        root = logging.getLogger()
        for handler in self._handlers:
            root.removeHandler(handler)
            handler.close()
        self._handlers = []
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._levels = {}
        logging.captureWarnings(False)


def setup(*, file: Path | None, level: str, console: Console) -> Closer:
    """Direct everything that is logged, and Python's own warnings, to `file` and to standard error.

    `level` (DEBUG, INFO, WARNING, ERROR, in any case) holds for the file and the full console; the quiet
    console shows nothing below INFO. A second call replaces the first. Raises ValueError for a level that
    does not exist, OSError for a file that cannot be opened.
    """
    threshold = logging.getLevelNamesMapping().get(level.upper())
    if threshold is None:
        raise ValueError(f"{level!r} is not a log level; use DEBUG, INFO, WARNING or ERROR")
    handlers: list[logging.Handler] = []
    if file is not None:
        handlers.append(_PrivateFile(file, threshold))
    if console != "none":
        handlers.append(_Console(console, threshold, tracebacks=console == "full" or file is None))
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, _PrivateFile | _Console)]:
        root.removeHandler(earlier)
        earlier.close()
    levels = {name: logging.getLogger(name).level for name in ("root", *_TALKATIVE)}
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    root.setLevel(threshold)
    for handler in handlers:
        root.addHandler(handler)
    logging.captureWarnings(True)
    return Closer(handlers, levels)


def once(logger: logging.Logger, key: str, message: str, *args: object, level: int = logging.WARNING) -> bool:
    """Log this unless `key` was logged on `logger` before; True when it was written.

    What was said is kept on the logger itself, which outlives whoever logs; `forget` lets a thing that
    recovered be mentioned again.
    """
    said: dict[str, None] = logger.__dict__.setdefault("_herd_said", {})
    if key in said:
        return False
    if len(said) >= _MOST_KEYS:
        said.pop(next(iter(said)))
    said[key] = None
    logger.log(level, message, *args, stacklevel=2)
    return True


def forget(logger: logging.Logger, key: str) -> bool:
    """The thing named `key` is well again; True when it had been complained about."""
    said: dict[str, None] = logger.__dict__.get("_herd_said", {})
    return said.pop(key, key) is None


def without_secrets(text: str) -> str:
    return _TOKEN.sub("herd1_…", text)


class JsonLine(logging.Formatter):
    """One record as one line of JSON; what a caller gave as `extra` stands beside the fixed fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in record.__dict__.items():
            if name not in _STANDARD_FIELDS:
                line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_secrets(_to_json(line))


def _to_json(line: dict[str, object]) -> str:
    try:
        return json.dumps(line, ensure_ascii=False, allow_nan=False, default=str)
    except (
        TypeError,
        ValueError,
    ):  # NaN, a key that is no string, a circle: the line matters more than the value
        return json.dumps({name: str(value) for name, value in line.items()}, ensure_ascii=False)


class _PrivateFile(TimedRotatingFileHandler):
    """A 0600 file, a new one each midnight. When the disk fails it says so once, and goes on trying."""

    def __init__(self, file: Path, threshold: int) -> None:
        self._complained = False
        super().__init__(
            file, when="midnight", backupCount=_KEPT_FILES, encoding="utf-8", errors="backslashreplace"
        )
        self.setLevel(threshold)
        self.setFormatter(JsonLine())

    def _open(self) -> TextIOWrapper:
        stream = open(  # noqa: SIM115 - the handler closes it
            self.baseFilename, self.mode, encoding=self.encoding, errors=self.errors, opener=_open_private
        )
        return cast(TextIOWrapper, stream)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            error = sys.exc_info()[1]
            sys.stderr.write(f"The log file {self.baseFilename} cannot be written: {error}\n")


def _open_private(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    if sys.platform != "win32":
        os.fchmod(descriptor, 0o600)
    return descriptor


class _Console(logging.StreamHandler[TextIOWrapper]):
    """Standard error, for a person: time and sentence; "full" adds level, logger and tracebacks."""

    def __init__(self, style: Console, threshold: int, *, tracebacks: bool) -> None:
        super().__init__(cast(TextIOWrapper, sys.stderr))
        self._full = style == "full"
        self._tracebacks = tracebacks
        self._colour = sys.platform != "win32" and sys.stderr.isatty()
        self.setLevel(threshold if self._full else max(threshold, logging.INFO))

    def filter(self, record: logging.LogRecord) -> bool:
        """The quiet console shows our own lines, and of others only errors."""
        ours = record.name.partition(".")[0] in _OURS
        return self._full or ours or record.levelno >= logging.ERROR

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        # Further lines are indented, so that a message cannot pass for two.
        message = record.getMessage().replace("\n", "\n         ")
        if self._full:
            message = f"{record.levelname:<7} {record.name}: {message}"
        if self._tracebacks and record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        text = without_secrets(message).translate(_CONTROLS)
        colour = _COLOURS.get(record.levelno) if self._colour else None
        return f"{time} {colour}{text}{_PLAIN}" if colour else f"{time} {text}"
