"""A host of files on loopback, and Hugging Face's list of a repository: with ranges, ETags and redirects.

The shapes of the hub are those of its public API (docs/backends.md): `/api/models/ORG/REPO/tree/main` lists
`{type, path, size, oid, lfs: {oid, size, pointerSize}}`, `/ORG/REPO/resolve/main/FILE` redirects to a store,
with `X-Linked-ETag`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self


def gguf(size_bytes: int, seed: int = 1) -> bytes:
    """Bytes that begin as a model does, and are different at each place."""
    words = (seed * 2654435761 + number * 40503 for number in range(size_bytes // 4 + 1))
    return (b"GGUF" + b"".join((word & 0xFFFFFFFF).to_bytes(4, "big") for word in words))[:size_bytes]


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass
class Served:
    """One file. What follows `body` are its host's manners."""

    body: bytes
    etag: str | None = '"v1"'
    ranges: bool = True
    cut_after: int | None = None
    """The connection is reset after so many bytes of one answer, once."""
    status: int = 200
    length: str | None = "right"
    """"right", None (chunked), or a number that is not."""
    location: str | None = None
    linked_etag: str | None = None
    wait: asyncio.Event | None = None
    """Half of the body, then nothing until this is set."""


@dataclass
class FileHost:
    files: dict[str, Served] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    left: int = 0
    """Clients that went in the middle."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._writers: set[asyncio.StreamWriter] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    def put(self, path: str, body: bytes, **manners: object) -> Served:
        served = self.files[path] = Served(body, **manners)  # type: ignore[arg-type]
        return served

    def put_repo(self, repo: str, files: dict[str, bytes]) -> None:
        """A public repository; its files lie in a store of their own, as large files do."""
        listed: list[dict[str, object]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "dir"}]
        for path, body in files.items():
            digest = sha256(body)
            lfs = {"oid": digest, "size": len(body), "pointerSize": 135}
            listed.append({"type": "file", "oid": "1" * 40, "size": len(body), "lfs": lfs, "path": path})
            self.put(f"/store/{digest}", body, etag=f'"{digest[:32]}"')
            self.put(
                f"/{repo}/resolve/main/{path}", b"", status=302, location=f"/store/{digest}",
                linked_etag=f'"{digest}"',
            )  # fmt: skip
        self.put(f"/api/models/{repo}/tree/main?recursive=true", json.dumps(listed).encode())

    def ranges(self, path: str) -> list[str | None]:
        return [headers.get("range") for target, headers in self.asked if target == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            target = head[0].split(" ")[1]
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
            }
            self.asked.append((target, headers))
            await self._answer(reader, writer, self.files.get(target), headers)
            await writer.drain()
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()
        self._writers.discard(writer)

    async def _answer(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        served: Served | None,
        headers: dict[str, str],
    ) -> None:
        if served is None:
            writer.write(b"HTTP/1.1 404 X\r\nContent-Length: 9\r\n\r\nnot found")
            return
        status, start, fields = served.status, 0, []
        if served.etag is not None:
            fields.append(f"ETag: {served.etag}")
        asked = headers.get("range")
        same = headers.get("if-range") in (None, served.etag)
        if status == 200 and asked is not None and served.ranges and same:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            if start >= len(served.body):
                writer.write(
                    f"HTTP/1.1 416 X\r\nContent-Range: bytes */{len(served.body)}\r\n"
                    "Content-Length: 0\r\n\r\n".encode()
                )
                return
            status = 206
            fields.append(f"Content-Range: bytes {start}-{len(served.body) - 1}/{len(served.body)}")
        if served.location is not None:
            fields.append(f"Location: {served.location}")
        if served.linked_etag is not None:
            fields.append(f"X-Linked-ETag: {served.linked_etag}")
        body = served.body[start:]
        if served.length == "right":
            fields.append(f"Content-Length: {len(body)}")
        elif served.length is not None:
            fields.append(f"Content-Length: {served.length}")
        writer.write("\r\n".join([f"HTTP/1.1 {status} X", *fields, "Connection: close", "", ""]).encode())
        await self._send(reader, writer, served, body)

    async def _send(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, served: Served, body: bytes
    ) -> None:
        if served.cut_after is not None:
            at, served.cut_after = served.cut_after, None
            writer.write(body[:at])
            await writer.drain()
            await asyncio.sleep(0.05)  # what was sent shall be read before the reset
            writer.transport.abort()
            return
        if served.wait is not None:
            writer.write(body[: len(body) // 2])
            await writer.drain()
            waiting = asyncio.ensure_future(served.wait.wait())
            leaving = asyncio.ensure_future(reader.read(1))
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            left = leaving.done()
            waiting.cancel()
            leaving.cancel()
            if left:
                self.left += 1
                return
            body = body[len(body) // 2 :]
        writer.write(body)
