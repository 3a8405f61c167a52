"""Manages the GGUF files of the agent's folder for a server that serves them.

The server is told what it must know (a file came, a file goes) and asked to load and unload; whatever it
cannot do with its models is refused with a sentence that says which nodes can.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

import orjson

from herd_node.models.downloads import Downloads
from herd_node.models.folder import GgufFile
from herd_node.models.manager import (
    NDJSON,
    Answer,
    Call,
    Offer,
    Refused,
    cannot,
    success,
)
from herd_node.models.reference import BadReference, parse_reference
from herd_node.runtime.threads import in_thread

log = logging.getLogger(__name__)

_WITH_FOLDER: frozenset[Offer] = frozenset({"pull-gguf", "delete", "load", "unload"})
_WITHOUT: frozenset[Offer] = frozenset({"load", "unload"})


class Server(Protocol):
    """What the manager needs of the server: the first two as in `Backend`."""

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None: ...

    async def unload(self, name: str) -> None: ...

    async def before_removal(self, file: GgufFile) -> None:
        """Let go of the file. Raises Refused where it is not to be removed."""

    def folder_changed(self) -> None:
        """A file came or went."""


class FolderManager:
    """`in_use`: whether the server serves the folder's files (as far as is known now)."""

    def __init__(self, server: Server, downloads: Downloads | None, in_use: Callable[[], bool]) -> None:
        self._server = server
        self._downloads = downloads
        self._in_use = in_use
        self.free_bytes: int | None = None

    @property
    def offers(self) -> frozenset[Offer]:
        return _WITH_FOLDER if self._downloads is not None and self._in_use() else _WITHOUT

    def look(self) -> None:
        """See how much room is left. Blocks a little, so polls do it, in a thread."""
        downloads = self._downloads
        self.free_bytes = downloads.folder.free_bytes() if downloads is not None and self._in_use() else None

    async def manage(self, call: Call) -> Answer:
        if call.verb == "load":
            await self._server.ensure_loaded(call.known_model, call.options)
            return success()
        if call.verb == "unload":
            await self._server.unload(call.known_model)
            return success()
        downloads = self._downloads if self._in_use() else None
        if downloads is not None and call.verb == "pull":
            return await self._pull(call, downloads)
        if downloads is not None and call.verb == "delete":
            return await self._delete(call, downloads)
        raise cannot(call.verb)

    async def _pull(self, call: Call, downloads: Downloads) -> Answer:
        if not call.model:
            raise Refused(400, "model is required")
        try:
            reference = parse_reference(call.model)
        except BadReference as error:
            raise Refused(400, str(error)) from None
        lines = downloads.follow(reference, self._server.folder_changed)
        if call.streams:
            return Answer(content_type=NDJSON, lines=lines)
        return await _folded(lines)

    async def _delete(self, call: Call, downloads: Downloads) -> Answer:
        name = call.known_model
        file = await in_thread(lambda: downloads.folder.find(name))
        if file is None:
            raise Refused(404, f"model '{call.model}' not found")
        await self._server.before_removal(file)
        try:
            await in_thread(lambda: downloads.folder.remove(file))
        except OSError as error:
            log.warning("%s cannot be removed: %s", file.path.name, error)
            raise Refused(500, f"the file of '{call.model}' cannot be removed: {error.strerror}") from None
        self._server.folder_changed()
        return Answer(content_type=None)


async def _folded(lines: AsyncGenerator[bytes, None]) -> Answer:
    """As Ollama does without a stream: the success alone, or the error with a status of its own."""
    try:
        last = b"{}"
        async for line in lines:
            last = line
    finally:
        await lines.aclose()
    fields = orjson.loads(last)
    return Answer(status=500 if "error" in fields else 200, body=orjson.dumps(fields))
