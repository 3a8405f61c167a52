"""The data folder: where things lie, who may read them, and locks that a killed process cannot leave behind.

Folders are 0700 and files 0600 on POSIX, made so from the first instant and repaired when they are not; on
Windows the user's profile folder has that effect by itself. Nothing here knows what the files mean.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from herd_node.protocol.names import is_node_id

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_log = logging.getLogger(__name__)

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600
#: Byte that is locked on Windows, where a locked byte cannot be read: far behind anything ever written.
_LOCKED_BYTE = 1 << 30


def default_root() -> Path:
    return Path.home() / ".fleet-manager"


@dataclass(frozen=True, slots=True)
class NodeDir:
    """What one node id keeps: agent id and credentials, what was loaded lately, its lock."""

    root: Path

    @property
    def agent_file(self) -> Path:
        return self.root / "agent.json"

    @property
    def warm_file(self) -> Path:
        return self.root / "warm.json"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    def ensure(self) -> None:
        _private_folder(self.root)
        _repair_files(self.root)


@dataclass(frozen=True, slots=True)
class DataDir:
    """The layout of `<data-dir>`. Only `ensure` touches the disk."""

    root: Path

    @property
    def config_file(self) -> Path:
        return self.root / "herd.toml"

    @property
    def lock_file(self) -> Path:
        return self.root / "herd.lock"

    @property
    def router_file(self) -> Path:
        return self.root / "router.json"

    @property
    def join_file(self) -> Path:
        return self.root / "join"

    @property
    def database_file(self) -> Path:
        return self.root / "latency.db"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def nodes(self) -> Path:
        return self.root / "nodes"

    def node(self, node_id: str) -> NodeDir:
        if not is_node_id(node_id):
            raise ValueError("not a node id, so not the name of a folder either")
        return NodeDir(self.nodes / node_id)

    def _files(self) -> tuple[Path, ...]:
        database = self.database_file
        beside = tuple(database.with_name(database.name + end) for end in ("-wal", "-shm"))
        return (self.config_file, self.lock_file, self.router_file, self.join_file, database, *beside)

    def ensure(self) -> None:
        """Make the folders, and take away from others what they may not have. Raises OSError."""
        # A folder that somebody named by mistake (a home, a project) keeps its rights: only ours change.
        ours = not self.root.exists() or any(file.exists() for file in (*self._files(), self.nodes))
        if ours or not any(self.root.iterdir()):
            _private_folder(self.root)
        for folder in (self.logs, self.models, self.nodes):
            _private_folder(folder)
        for file in self._files():
            if file.is_file() and not file.is_symlink():
                _repair(file, _FILE_MODE)
        _repair_files(self.logs)
        for entry in self.nodes.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                NodeDir(entry).ensure()


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
    _repair(folder, _FOLDER_MODE)


def _repair_files(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_file() and not entry.is_symlink():
            _repair(entry, _FILE_MODE)


def _repair(path: Path, wanted: int) -> None:
    """Take every right from group and others, give the owner the wanted ones; a file that is gone is fine."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(FileNotFoundError):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077 or mode & wanted != wanted:
            path.chmod(wanted)
            if mode & 0o077:
                _log.warning("%s was open to other users (%03o); it is %03o now", path, mode, wanted)


def write_private(path: Path, data: bytes) -> None:
    """Replace the file by `data`, whole or not at all, readable by its owner only."""
    part = _write_beside(path, data)
    try:
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def create_private(path: Path, data: bytes) -> bytes:
    """Make the file unless it is there; returns what it holds now, so two who race get the same answer."""
    part = _write_beside(path, data)
    try:
        if sys.platform == "win32":
            part.rename(path)  # fails there, and only there, when the target exists
        else:
            os.link(part, path)
    except FileExistsError:
        found = read_private(path)
        return data if found is None else found
    finally:
        part.unlink(missing_ok=True)
    return data


def read_private(path: Path) -> bytes | None:
    """The file's bytes, None when there is no such file. One that others could read is closed to them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    _repair(path, _FILE_MODE)
    return data


def _write_beside(path: Path, data: bytes) -> Path:
    """`data` in a new 0600 file of the same folder, on the disk."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    part = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


class LockHeld(Exception):
    """Another process has the lock."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is locked by another process")
        self.path = path


class FileLock:
    """A lock that the operating system releases when the process ends, however it ends.

    The file itself stays: removing it would let two processes lock two files of one name. Programs that this
    process starts do not inherit the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> bool:
        """True when it is ours now; False, at once, when somebody (this object included) has it."""
        if self._descriptor is not None:
            return False
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, _FILE_MODE)
        try:
            locked = _try_lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if not locked:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            _unlock(descriptor)
            os.close(descriptor)

    def __enter__(self) -> FileLock:
        if not self.acquire():
            raise LockHeld(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


if sys.platform == "win32":

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
