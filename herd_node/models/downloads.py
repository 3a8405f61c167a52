"""GGUF files on their way into the models folder: one download for everybody who waits for it.

A file is written to `NAME.part` under a lock, beside a note of what it will be; its hash is counted while it
comes. It gets its name only when size and hash (where the source gives one) are right, and never in place of
another file. Whoever leaves last ends the download; what came is kept, and the next one goes on from there,
if the source says that it is still the same (ETag, or the hash).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from herd_node.models.folder import GgufFile, ModelsFolder, read_note
from herd_node.models.manager import error_line, status_line
from herd_node.models.outward import FetchError, Opened, Outward
from herd_node.models.reference import (
    BadReference,
    HubReference,
    Reference,
    UrlReference,
    choose,
    file_name_of,
    hub_file_url,
    hub_files,
    hub_list_url,
    sha256_in,
)
from herd_node.runtime.clock import Clock
from herd_node.runtime.paths import FileLock, write_private
from herd_node.runtime.tasks import Tasks
from herd_node.runtime.threads import in_thread

log = logging.getLogger(__name__)

#: Left free on the disk, whatever is pulled.
RESERVE_BYTES = 1024**3
#: As often as Ollama says it.
PROGRESS_INTERVAL_S = 0.06
#: Tries in a row that bring nothing, each after a longer pause; what came is never fetched twice.
MAX_VAIN_TRIES = 5
_WRITE_BYTES = 1024 * 1024
_READ_BYTES = 16 * 1024 * 1024
_LOOK_AGAIN_S = 0.5
_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One file. `size_bytes` and `sha256` are what a list said of it beforehand."""

    url: str
    file_name: str
    asked_as: str
    size_bytes: int | None = None
    sha256: str | None = None


class Downloads:
    """Everything that is on its way into one folder."""

    def __init__(
        self, folder: ModelsFolder, outward: Outward, tasks: Tasks, clock: Clock, *, hub: str
    ) -> None:
        self.folder = folder
        self.outward = outward
        self.clock = clock
        self.hub = hub
        self._tasks = tasks
        self._running: dict[Reference, Download] = {}

    async def follow(self, reference: Reference, on_done: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """Ollama's lines about it, the last one a success or an error. Close the generator to leave.

        `on_done` is called once a download, when the file has its name.
        """
        yield status_line("pulling manifest")
        running = self._running.get(reference)
        if running is None or running.ended:
            running = self._running[reference] = Download(self, reference, on_done)
            running.task = self._tasks.spawn(running.run(), name="pull")
        running.followers += 1
        try:
            async for line in running.lines():
                yield line
        finally:
            running.followers -= 1
            if running.followers == 0 and self._running.get(reference) is running:
                del self._running[reference]
                if running.task is not None:
                    running.task.cancel()


class Progress(NamedTuple):
    """How much of the file there is."""

    sha256: str | None
    total_bytes: int
    done_bytes: int

    def line(self) -> bytes:
        """Ollama's line of a layer. Without a hash that is known beforehand there is no `digest`."""
        digest = {} if self.sha256 is None else {"digest": f"sha256:{self.sha256}"}
        done = {"completed": self.done_bytes} if self.done_bytes else {}
        name = self.sha256[:12] if self.sha256 else "file"
        return status_line(f"pulling {name}", **digest, total=self.total_bytes, **done)


class Download:
    """One file on its way. What it says is kept, so that whoever comes later hears it too."""

    def __init__(self, all_of_them: Downloads, reference: Reference, on_done: Callable[[], None]) -> None:
        self.followers = 0
        self.task: asyncio.Task[None] | None = None
        self._all = all_of_them
        self._reference = reference
        self._on_done = on_done
        self._folder, self._clock = all_of_them.folder, all_of_them.clock
        self._said: list[bytes] = []
        self._progress: Progress | None = None
        self.ended = False
        self._changed = asyncio.Event()

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """A slow reader gets the latest progress, and not all of it."""
        said, shown = 0, None
        while True:
            changed = self._changed
            if self._progress is not None and self._progress != shown:
                shown = self._progress
                yield shown.line()
                if not self.ended:
                    await self._clock.sleep(PROGRESS_INTERVAL_S)
            while said < len(self._said):
                said += 1
                yield self._said[said - 1]
            if self.ended and said == len(self._said):
                return
            await changed.wait()

    async def run(self) -> None:
        try:
            await self._pull()
            self._say(status_line("success"))
            self._on_done()
        except (FetchError, BadReference) as error:
            self._say(error_line(f"pull model: {error}"))
        except OSError as error:
            log.warning("a pull failed: %s", error)
            self._say(error_line(f"pull model: the models folder: {error.strerror or error}"))
        except Exception:  # whoever waits must hear that it ended; the log says why
            log.exception("a pull failed")
            self._say(error_line("pull model: unexpected error, see the agent's log"))
        finally:
            self.ended = True
            self._tell()

    # -- the steps

    async def _pull(self) -> None:
        # 1. it was pulled before: nothing is asked of anybody
        if self._reference.name and (there := await in_thread(self._pulled_before)) is not None:
            self._show(there[0], there[1], there[1])
            return
        # 2. which file that is
        wanted = await self._wanted()
        await in_thread(self._folder.ensure)
        lock = FileLock(self._folder.root / f".{wanted.file_name}.lock")
        while not await in_thread(lock.acquire):
            await self._clock.sleep(_LOOK_AGAIN_S)  # another process, or another name for it
        try:
            await self._pull_locked(wanted)
        finally:
            lock.release()

    def _pulled_before(self) -> tuple[str | None, int] | None:
        file = self._folder.find(self._reference.name)
        return None if file is None else (file.sha256, file.size_bytes)

    async def _wanted(self) -> Wanted:
        reference = self._reference
        if isinstance(reference, UrlReference):
            return Wanted(url=reference.url, file_name=reference.file_name, asked_as=reference.name)
        return await self._look_up(reference)

    async def _look_up(self, reference: HubReference) -> Wanted:
        status, listed = await self._all.outward.json(hub_list_url(self._all.hub, reference))
        if status in (401, 403, 404):
            raise FetchError(f"there is no public repository {reference.repo} on Hugging Face")
        if status != 200:
            raise FetchError(f"Hugging Face answers {status}", passing=True)
        file = choose(hub_files(listed), reference)
        return Wanted(
            url=hub_file_url(self._all.hub, reference, file),
            file_name=file_name_of(file.path),
            asked_as=reference.name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )

    async def _pull_locked(self, wanted: Wanted) -> None:
        there = await in_thread(lambda: self._folder.at(wanted.file_name))
        if there is not None:
            await self._take_as_it_is(there, wanted)
            return
        part = Part(self._folder.root / f"{wanted.file_name}.part")
        try:
            await self._fetch(wanted, part)
        finally:
            await in_thread(part.close)
        self._say(status_line("verifying sha256 digest"))
        found = part.sha256
        expected = wanted.sha256 or part.linked_sha256
        if expected is not None and found != expected:
            await in_thread(part.remove)
            raise FetchError(
                f"digest mismatch, file must be downloaded again: want sha256:{expected}, got sha256:{found}"
            )
        self._say(status_line("writing manifest"))
        note = {"asked_as": wanted.asked_as, "sha256": found}
        try:
            await in_thread(lambda: self._folder.place(part.path, wanted.file_name, note))
        except FileExistsError:
            raise FetchError(f"{wanted.file_name} is there already; nothing is overwritten") from None
        await in_thread(part.remove)
        log.info("pulled %s (%d bytes)", wanted.file_name, part.size_bytes)

    async def _take_as_it_is(self, there: GgufFile, wanted: Wanted) -> None:
        """A file of that name is there: all is well if it is the one, however it came."""
        found = there.sha256
        if found is None and wanted.sha256 is not None and there.size_bytes == wanted.size_bytes:
            self._say(status_line("verifying sha256 digest"))
            found = await _sha256_of(there.path)
        if found is None or found != wanted.sha256:
            raise FetchError(
                f"{there.path.name} is there already, from elsewhere; nothing is overwritten, delete "
                f"'{there.name}' first"
            )
        if there.sha256 is None:
            note = {"asked_as": wanted.asked_as, "sha256": found}
            await in_thread(lambda: self._folder.note(there.path, note))
        self._show(found, there.size_bytes, there.size_bytes)

    async def _fetch(self, wanted: Wanted, part: Part) -> None:
        """Until all of it is there; a connection that breaks is taken up again."""
        vain = 0
        await part.open(wanted)
        while True:
            before_bytes = part.size_bytes
            try:
                return await self._fetch_on(wanted, part)
            except FetchError as error:
                vain = vain + 1 if part.size_bytes <= before_bytes else 0
                if not error.passing or vain >= MAX_VAIN_TRIES:
                    raise
            finally:
                await part.flush()
            await self._clock.sleep(2.0**vain)

    async def _fetch_on(self, wanted: Wanted, part: Part) -> None:
        headers = {}
        if part.size_bytes:
            headers["range"] = f"bytes={part.size_bytes}-"
            if part.etag is not None:
                headers["if-range"] = part.etag
        async with self._all.outward.get(wanted.url, headers) as opened:
            total_bytes = await self._begin(wanted, part, opened)
            self._show(wanted.sha256 or part.linked_sha256, total_bytes, part.size_bytes)
            if part.size_bytes == total_bytes:
                return
            async for piece in opened.pieces():
                await part.write(piece)
                if part.size_bytes > total_bytes:
                    await part.start_again()
                    raise FetchError("it is longer than the host said")
                self._show(wanted.sha256 or part.linked_sha256, total_bytes, part.size_bytes)
        if part.size_bytes < total_bytes:
            raise FetchError("the connection broke off", passing=True)

    async def _begin(self, wanted: Wanted, part: Part, opened: Opened) -> int:
        """Look at the head of the answer; returns how long the file will be."""
        # 1. a part that is no part of it any more, or is all of it
        if opened.status == 416 and part.size_bytes:
            total_bytes = _total_in(opened.header("content-range"))
            if total_bytes == part.size_bytes:
                return total_bytes
            await part.start_again()
            raise FetchError("what came before does not fit", passing=True)
        _check_status(opened)
        if opened.status == 206:
            total_bytes = _total_in(opened.header("content-range"), part.size_bytes)
            if total_bytes is None or part.etag not in (None, opened.header("etag")):
                await part.start_again()
                raise FetchError("the host sends another part than was asked for", passing=True)
        else:
            await part.start_again()
            total_bytes = _length_in(opened.header("content-length"))
        # 2. how large it is, and whether it fits
        if total_bytes is None:
            raise FetchError("the host does not say how large it is")
        if total_bytes < len(_MAGIC):
            raise FetchError("what the host sends is no GGUF file")
        if wanted.size_bytes is not None and wanted.size_bytes != total_bytes:
            raise FetchError(
                f"it has {total_bytes} bytes, and not {wanted.size_bytes} as Hugging Face lists it"
            )
        await self._check_room(total_bytes - part.size_bytes)
        # 3. what the next call will go by
        part.linked_sha256 = opened.linked_sha256 or part.linked_sha256
        if wanted.sha256 is not None and part.linked_sha256 not in (None, wanted.sha256):
            raise FetchError("Hugging Face lists another file than it sends; try again")
        part.etag = _strong(opened.header("etag"))
        await in_thread(lambda: part.keep_note(wanted))
        return total_bytes

    async def _check_room(self, needed_bytes: int) -> None:
        free_bytes = await in_thread(self._folder.free_bytes)
        if free_bytes is not None and needed_bytes + RESERVE_BYTES > free_bytes:
            raise FetchError(
                f"not enough disk: {needed_bytes} bytes are still to come, {free_bytes} are free, "
                f"and {RESERVE_BYTES} stay free"
            )

    # -- what the followers hear

    def _show(self, sha256: str | None, total_bytes: int, done_bytes: int) -> None:
        self._progress = Progress(sha256, total_bytes, done_bytes)
        self._tell()

    def _say(self, line: bytes) -> None:
        self._said.append(line)
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Part:
    """A `.part` file, open for appending, its hash so far, and the note beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self.etag: str | None = None
        self.linked_sha256: str | None = None
        self._file: Any = None
        self._hash = hashlib.sha256()
        self._unwritten = bytearray()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def open(self, wanted: Wanted) -> None:
        """Go on from what is there, if it was a part of the same file and can be told to be so still."""
        if not await in_thread(lambda: self._open(wanted)):
            return
        while piece := await in_thread(self._read_on):
            self.size_bytes += piece

    def _open(self, wanted: Wanted) -> bool:
        note = read_note(self._note_path)
        etag, linked = note.get("etag"), sha256_in(note.get("linked_sha256"))
        same = note.get("url") == _unsigned(wanted) and note.get("sha256") == wanted.sha256
        known_again = isinstance(etag, str) or wanted.sha256 is not None or linked is not None
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._file = os.fdopen(descriptor, "r+b")
        if not (same and known_again):
            self._file.truncate(0)
            return False
        self.etag, self.linked_sha256 = (etag if isinstance(etag, str) else None), linked
        return True

    def _read_on(self) -> int:
        piece: bytes = self._file.read(_READ_BYTES)
        self._hash.update(piece)
        return len(piece)

    async def write(self, piece: bytes) -> None:
        """Raises FetchError for what is no GGUF at all."""
        if self.size_bytes < len(_MAGIC):
            start = (bytes(self._unwritten) + piece)[: len(_MAGIC)]
            if not _MAGIC.startswith(start):
                await self.start_again()
                raise FetchError("what the host sends is no GGUF file")
        self._unwritten += piece
        self.size_bytes += len(piece)
        if len(self._unwritten) >= _WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        if self._unwritten:
            await in_thread(self._append)

    async def start_again(self) -> None:
        self._unwritten.clear()
        if self.size_bytes:
            await in_thread(lambda: self._file.truncate(0))
            await in_thread(lambda: self._file.seek(0))
        self.size_bytes, self._hash = 0, hashlib.sha256()

    def keep_note(self, wanted: Wanted) -> None:
        note = {
            "url": _unsigned(wanted),
            "sha256": wanted.sha256,
            "etag": self.etag,
            "linked_sha256": self.linked_sha256,
        }
        write_private(self._note_path, json.dumps(note).encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            with suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)

    @property
    def _note_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def _append(self) -> None:
        self._hash.update(self._unwritten)
        self._file.write(self._unwritten)
        self._unwritten.clear()


async def _sha256_of(path: Path) -> str:
    """In pieces, so that it ends soon when nobody waits for it any more."""
    digest, position, more = hashlib.sha256(), 0, True

    def count() -> bool:
        with path.open("rb") as file:
            file.seek(position)
            piece = file.read(_READ_BYTES)
        digest.update(piece)
        return bool(piece)

    while more:
        more = await in_thread(count)
        position += _READ_BYTES
    return digest.hexdigest()


def _unsigned(wanted: Wanted) -> str:
    """The URL without its query, which may hold a secret and changes where it is a signature."""
    return wanted.url.partition("?")[0]


def _check_status(opened: Opened) -> None:
    status = opened.status
    if status in (200, 206):
        return
    if status in (401, 403):
        raise FetchError(f"the host does not give it to everybody ({status})")
    if status in (404, 410):
        raise FetchError("file does not exist")
    raise FetchError(f"the host answers {status}", passing=status >= 500 or status == 429)


def _length_in(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _total_in(text: str | None, start_bytes: int | None = None) -> int | None:
    """Of `bytes 5-9/10` (or `bytes */10`); None when it does not begin where it should."""
    unit, _, rest = (text or "").partition(" ")
    span, _, total = rest.partition("/")
    if unit != "bytes" or (start_bytes is not None and span.partition("-")[0] != str(start_bytes)):
        return None
    return _length_in(total)


def _strong(etag: str | None) -> str | None:
    """Only a strong one says that the bytes are the same."""
    return etag if etag is not None and etag.startswith('"') else None
