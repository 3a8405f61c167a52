"""Where one record of a streamed body ends and the next begins: SSE events and NDJSON lines.

Sans-I/O: bytes go in as they came from the socket, records come out. UTF-8 is never decoded (a record may be
cut inside a character) and JSON is never parsed here. Any split of the same bytes gives the same records.
"""

from __future__ import annotations

from typing import Literal

MAX_RECORD_BYTES = 4 * 1024 * 1024

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class FramingError(ValueError):
    """A record is longer than the limit: the stream cannot be trusted any more."""


class Records:
    """Splits one body. `feed` returns the records that ended in this chunk; `rest` closes the body.

    NDJSON: a record is a line (LF or CRLF); empty lines are dropped.
    SSE: a record is the joined `data` of an event; comments, other fields, events without data are dropped.
    """

    __slots__ = ("_after_cr", "_broken", "_first", "_limit_bytes", "_separator", "_sse", "_tail", "pending")

    def __init__(self, kind: Literal["sse", "ndjson"], max_record_bytes: int = MAX_RECORD_BYTES) -> None:
        self._sse = kind == "sse"
        self._separator = b"\n\n" if self._sse else b"\n"
        self._limit_bytes = max_record_bytes
        self._tail: list[bytes] = []
        self._after_cr = False
        self._first = True
        self._broken = False
        self.pending = 0
        """Bytes of the record that has begun and not ended."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The records that this chunk completed. Records before an oversized one still come out."""
        if self._broken:
            raise self._error()
        record = self.lone(chunk)
        if record:
            self._first = False
            return [record]
        if self._sse and (self._after_cr or b"\r" in chunk):
            chunk = self._unify_line_ends(chunk)
        if not chunk:
            return []
        blocks = self._blocks(chunk)
        tail = blocks.pop()
        records = self._records(blocks)
        if blocks:
            self._tail = [tail] if tail else []
            self.pending = len(tail)
        # the LF that may be the first half of a separator is not counted
        if (
            self.pending > self._limit_bytes
            and self.pending - self._tail[-1].endswith(b"\n") > self._limit_bytes
        ):
            self._broken = True
        if self._broken:
            self._tail, self.pending = [], 0
            if not records:
                raise self._error()
        return records

    def lone(self, chunk: bytes) -> bytes:
        """The record of a chunk that is one record and nothing else, as most are; empty for any other.

        Such a chunk leaves nothing behind, so a caller that takes the record need not feed it.
        """
        if not self.between or len(chunk) > self._limit_bytes:
            return b""
        if not self._sse:
            end = len(chunk) - 1
            return chunk[:end].removesuffix(b"\r") if chunk.find(b"\n") == end else b""
        end = len(chunk) - 2
        start = 0
        if chunk[:6] != b"data: ":
            if chunk[:7] != b"event: ":
                return b""
            start = chunk.find(b"\n") + 1  # a named event: its data stands behind the name
            if chunk[start : start + 6] != b"data: ":
                return b""
        if chunk.find(b"\n", start) != end or chunk[-1:] != b"\n" or chunk.find(b"\r") >= 0:
            return b""  # `in` would cost twice as much as `find`
        return chunk[start + 6 : end]

    @property
    def between(self) -> bool:
        """Nothing of a record that has begun is kept: what comes next may be left out."""
        return not (self.pending or self._after_cr or self._broken)

    def rest(self) -> bytes:
        """What the end of the body completes: a last NDJSON line without line end; never an SSE event."""
        if self._broken:
            raise self._error()
        tail, self._tail, self.pending = self._tail, [], 0
        return b"" if self._sse else b"".join(tail).removesuffix(b"\r")

    def _error(self) -> FramingError:
        return FramingError(f"a record is longer than {self._limit_bytes} bytes")

    def _unify_line_ends(self, chunk: bytes) -> bytes:
        """CRLF and CR become LF; a CRLF that the chunks cut in two counts once."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _blocks(self, chunk: bytes) -> list[bytes]:
        """What stands between separators, the unfinished rest last; a lone rest has been put by already."""
        tail = self._tail
        if not tail:
            blocks = chunk.split(self._separator)
        elif self._sse and chunk.startswith(b"\n") and tail[-1].endswith(b"\n"):
            # the chunks cut the separator in two
            return [b"".join(tail)[:-1], *chunk[1:].split(b"\n\n")]
        else:
            blocks = chunk.split(self._separator)
            if len(blocks) > 1:
                tail.append(blocks[0])
                blocks[0] = b"".join(tail)
        if len(blocks) == 1:
            tail.append(chunk)
            self.pending += len(chunk)
        return blocks

    def _records(self, blocks: list[bytes]) -> list[bytes]:
        records = []
        for block in blocks:
            if len(block) > self._limit_bytes:
                self._broken = True
                break
            if not self._sse:
                record = block.removesuffix(b"\r")
            elif block.startswith(b"data: ") and b"\n" not in block:
                record = block[6:]
            else:
                record = self._joined_data(block)
            self._first = False
            if record:
                records.append(record)
        return records

    def _joined_data(self, block: bytes) -> bytes:
        if self._first:
            block = block.removeprefix(_BYTE_ORDER_MARK)
        values = []
        for line in block.split(b"\n"):
            if line.startswith(b"data:"):
                values.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif line == b"data":
                values.append(b"")
        return b"\n".join(values) if any(values) else b""
