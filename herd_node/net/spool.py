"""A request body of any length, kept until it is known to be good: in memory up to 1 MiB, then in a file.

The file has no name (POSIX), or goes with its last handle (Windows), so a killed process leaves nothing. The
hash is counted while the body comes in, off the event loop once it is a file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import AsyncIterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Any

from herd_node.protocol.forms import Body
from herd_node.runtime.threads import in_thread

MEMORY_BYTES = 1024 * 1024


class Spool:
    """Written once, then read any number of times; `close` it (or use it as a context)."""

    def __init__(self, folder: Path | None = None) -> None:
        self.size_bytes = 0
        self._folder = folder
        self._memory = bytearray()
        self._file: Any = None
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all that was written; after `end`."""
        return self._hash.hexdigest()

    async def write(self, piece: bytes) -> None:
        """Raises OSError, where the disk is full for one."""
        self.size_bytes += len(piece)
        self._memory += piece
        if len(self._memory) >= MEMORY_BYTES:
            await in_thread(self._move_to_file)

    async def end(self) -> None:
        """All has been written."""
        if self._file is not None:
            await in_thread(self._move_to_file)
        elif len(self._memory) > MEMORY_BYTES // 4:
            await in_thread(self._count)
        else:
            self._count()

    async def whole(self) -> bytes:
        """All of it, for one that is known to be small."""
        return b"".join([piece async for piece in self.pieces()])

    async def pieces(self) -> AsyncIterator[bytes]:
        """From the start, each time that it is asked."""
        if self._file is None:
            if len(self._memory) != self.size_bytes:
                raise ValueError("the body has been let go")
            if self._memory:
                yield bytes(self._memory)
            return
        position = 0
        while position < self.size_bytes:
            piece = await in_thread(lambda at=position: self._read(at))  # type: ignore[misc]
            position += len(piece)
            yield piece

    def mapped(self) -> Body:
        """All of it as something to be searched and sliced; after `end`. What is in a file stays there."""
        if self._file is None:
            return bytes(self._memory)
        self._file.flush()
        return mmap(self._file.fileno(), 0, access=ACCESS_READ)

    def close(self) -> None:
        self._memory.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _move_to_file(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix=".body-")  # noqa: SIM115 - see close
        self._hash.update(self._memory)
        self._file.write(self._memory)
        self._memory.clear()

    def _count(self) -> None:
        self._hash.update(self._memory)

    def _read(self, position: int) -> bytes:
        self._file.seek(position)
        piece: bytes = self._file.read(MEMORY_BYTES)
        if not piece:
            raise OSError("the temporary file is shorter than what was written")
        return piece
