"""The chunked coding of HTTP/1.1 bodies in the usual case: pieces to frame, reads that are whole chunks.

Sans-I/O. What is not usual (a cut chunk, an extension, the end of a body) is the parser's, not guessed here.
"""

from __future__ import annotations

from typing import Final

_LINES: Final = tuple(b"%x\r\n" % size for size in range(1024))
"""The size lines of short chunks: to look one up is quicker than to write it."""


def chunk_of(piece: bytes) -> bytes:
    """A piece of a body as it goes over the wire; an empty one would be the end of the body."""
    size = len(piece)
    return b"".join((_LINES[size] if size < 1024 else b"%x\r\n" % size, piece, b"\r\n"))


def whole_chunks(data: bytes) -> bytes:
    """What the chunks hold of which `data` is made, if it is made of whole ones; else nothing.

    A parser that stands between two chunks stands between two chunks behind such data, so it need not see it.
    Only sizes written as everybody writes them are taken, and no end of a body.
    """
    start = data.find(b"\r\n") + 2
    size = len(data) - start - 2
    if 0 < size < 1024 and data.startswith(_LINES[size]) and data.endswith(b"\r\n"):
        return data[start:-2]
    parts = data.split(b"\r\n")
    pieces = parts[1::2]
    if len(parts) % 2 == 0 or parts[-1] or b"" in pieces:
        return b""
    return b"".join(pieces) if [b"%x" % len(piece) for piece in pieces] == parts[:-1:2] else b""
