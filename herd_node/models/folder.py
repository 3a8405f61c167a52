"""The agent's folder of GGUF files: what lies in it, where each came from, and what may be removed.

No name of a caller ever becomes a path: files are found by looking at what is there, and a new one gets a
name of plain characters. Beside a file that was pulled lies `FILE.json`, which says by which name it was
asked for, and its SHA-256.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from herd_node.models.reference import is_model_file
from herd_node.protocol.names import canonical, is_model_name
from herd_node.runtime.paths import write_private

log = logging.getLogger(__name__)

MAX_NOTE_BYTES = 64 * 1024
#: A split model is served by its first part.
_LATER_PARTS = tuple(f"-{number:05d}-of-" for number in range(2, 100))


class GgufFile(NamedTuple):
    """One model in the folder. `asked_as` is the name it was pulled by, "" where somebody put it there."""

    name: str
    path: Path
    size_bytes: int
    modified_wall_s: float
    asked_as: str = ""
    sha256: str | None = None

    @property
    def aliases(self) -> tuple[str, ...]:
        return (self.asked_as,) if self.asked_as else ()


class ModelsFolder:
    """Reads the folder anew each time: others may put files there. Every method blocks a little."""

    def __init__(self, root: Path, *, named: bool = False) -> None:
        self.root = root
        self.named = named
        """The user named it, so a server whose folder is still empty is taken to serve it."""
        self._notes: dict[Path, tuple[int, Mapping[str, object]]] = {}

    def files(self) -> tuple[GgufFile, ...]:
        """By name; empty when there is no folder yet."""
        try:
            with os.scandir(self.root) as entries:
                found = [self._file(Path(entry.path)) for entry in entries if is_model_file(entry.name)]
        except OSError:
            return ()
        return tuple(sorted(file for file in found if file is not None))

    def find(self, name: str) -> GgufFile | None:
        """By its own name, or by the one it was pulled by."""
        wanted, files = canonical(name), self.files()
        for file in files:
            if canonical(file.name) == wanted:
                return file
        return next((file for file in files if wanted in map(canonical, file.aliases)), None)

    def at(self, file_name: str) -> GgufFile | None:
        """What lies under a file name, whatever its case: some file systems know none."""
        return next((f for f in self.files() if f.path.name.lower() == file_name.lower()), None)

    def free_bytes(self) -> int | None:
        """Of the file system that it is on; it need not exist yet."""
        for folder in (self.root, *self.root.parents):
            try:
                return shutil.disk_usage(folder).free
            except FileNotFoundError:
                continue
            except OSError:
                return None
        return None

    def ensure(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def holds(self, path: str) -> bool:
        """Whether a file that a server names lies in here."""
        try:
            return self.root.resolve() in Path(path).resolve().parents
        except OSError:
            return False

    def place(self, part: Path, file_name: str, note: Mapping[str, object]) -> Path:
        """Give a finished download its name. Raises FileExistsError: nothing is ever overwritten."""
        target = self.root / file_name
        if sys.platform == "win32":
            part.rename(target)
        else:
            try:
                os.link(part, target)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                if target.exists():
                    raise FileExistsError(target) from None
                part.rename(target)
            part.unlink(missing_ok=True)
        self.note(target, note)
        return target

    def note(self, path: Path, note: Mapping[str, object]) -> None:
        """What is known of a file that lies in here."""
        write_private(note_file(path), json.dumps(note).encode())

    def remove(self, file: GgufFile) -> None:
        """The file and what is known of it. Raises OSError."""
        if file.path.parent != self.root:
            raise PermissionError(f"{file.path.name} does not lie in the models folder")
        file.path.unlink()
        for beside in (note_file(file.path), file.path.with_name(f"{file.path.name}.sha256")):
            beside.unlink(missing_ok=True)
        log.info("removed %s from the models folder", file.path.name)

    def _file(self, path: Path) -> GgufFile | None:
        name = path.name[: -len(".gguf")]
        if not is_model_name(name) or any(part in name for part in _LATER_PARTS):
            return None
        try:
            status = path.stat()
        except OSError:  # it went just now, or leads nowhere
            return None
        note = self._note(path)
        asked_as, sha256 = note.get("asked_as"), note.get("sha256")
        return GgufFile(
            name,
            path,
            status.st_size,
            status.st_mtime,
            asked_as if is_model_name(asked_as) and isinstance(asked_as, str) else "",
            sha256 if isinstance(sha256, str) else None,
        )

    def _note(self, path: Path) -> Mapping[str, object]:
        """Read again only when it changed."""
        beside = note_file(path)
        try:
            changed_ns = beside.stat().st_mtime_ns
        except OSError:
            return {}
        known = self._notes.get(beside)
        if known is None or known[0] != changed_ns:
            known = self._notes[beside] = (changed_ns, read_note(beside))
        return known[1]


def note_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_note(path: Path) -> Mapping[str, object]:
    """Empty when there is none that can be read."""
    try:
        raw = path.read_bytes()
        note = json.loads(raw) if len(raw) <= MAX_NOTE_BYTES else None
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
