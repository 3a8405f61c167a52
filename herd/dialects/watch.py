"""The watch over one answer's stream: whole records go on, and how it ended is known. The hot path.

It parses the first content record, the last few, and those that might be an error or the end; no others. It
trusts no backend, and it sends, retries and records nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from herd.dialects import base
from herd.dialects.base import Dialect, Ending, Verdict
from herd_node.protocol.framing import MAX_RECORD_BYTES, FramingError, Records

_BRACE, _END_BRACE = b"{}"
#: How a record that is one JSON object begins and ends on the wire.
_PLAIN_RECORD = {"sse": (b"data: {", b"}\n\n"), "ndjson": (b"{", b"}\n")}


class StreamWatch:
    """Watches one answer's records go by. `feed` returns the bytes that may go on: whole records only.

    A record cut by a chunk border is kept until it is whole, so that an error record can follow at any time.
    What comes behind the end mark is dropped: an answer has one end.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._marks = dialect.marks
        self._opening, self._closing = _PLAIN_RECORD[dialect.framing]
        if dialect.event:
            self._opening = b"event: %b\n%b" % (dialect.event, self._opening)
        self._start, self._line_ends = len(self._opening) - 1, len(self._closing) - 1
        self._lines = self._opening.count(b"\n") + self._line_ends
        self._records = Records(dialect.framing)
        self._flows = False
        """Content has come, and every record that has begun has ended."""
        self._held: list[bytes] = []
        self._ending: Ending | None = None
        self._first: list[bytes] = []
        self.last: deque[bytes] = deque(maxlen=4)
        self.content_seen = False
        self.ended = False
        """The end mark has come, and the answer is complete."""
        self.failed: Verdict | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Take what came; return what may be forwarded. Sets `content_seen`, `ended`, `failed`."""
        if self._flows and chunk.endswith(self._closing) and chunk.startswith(self._opening):
            if chunk.find(b"\n", self._start) == len(chunk) - self._line_ends:
                if self._is_unread(chunk):
                    self.last.append(chunk[self._start : -self._line_ends])
                    return chunk
            elif self._is_plain_run(chunk):
                records = chunk[: -self._line_ends].rsplit(self._closing[1:], 4)[-4:]
                self.last += [record[self._start :] for record in records]
                return chunk
        if self.failed is not None or self.ended:
            return b""
        out = self._read(chunk)
        in_order = self.failed is None and not self.ended
        self._flows = in_order and self.content_seen and not self._held and self._records.between
        return out

    def _is_unread(self, chunk: bytes) -> bool:
        """Whether plain records may pass without being read. (`find` because `in` costs twice as much.)"""
        for mark in self._marks:
            if chunk.find(mark) >= 0:
                return False
        return chunk.find(b"\r") < 0 and len(chunk) <= MAX_RECORD_BYTES

    def _is_plain_run(self, chunk: bytes) -> bool:
        """Whether a chunk that begins and ends as a plain record does is made of plain ones alone: between
        them stand a record's end and the next one's beginning, and there is no line more."""
        count = chunk.count(self._closing + self._opening) + 1
        return chunk.count(b"\n") == count * self._lines and self._is_unread(chunk)

    def _read(self, chunk: bytes) -> bytes:
        try:
            payloads = self._records.feed(chunk)
            if len(chunk) > MAX_RECORD_BYTES:
                self._records.feed(b"")  # a record of this very chunk may have been too long
        except FramingError:
            self.failed = Verdict.MALFORMED
            return b""
        for index, payload in enumerate(payloads):
            if self.content_seen and self._is_plain(payload):
                self.last.append(payload)
                continue
            if not self._look_at(payload):
                return self._framed(payloads[:index])
            if self.ended and (index + 1 < len(payloads) or self._records.pending):
                return self._framed(payloads[: index + 1])
        return self._whole_records(chunk, bool(payloads))

    def _is_plain(self, payload: bytes) -> bool:
        """After the first content: whether it is content unread."""
        if payload[0] != _BRACE or payload[-1] != _END_BRACE:
            return False
        for mark in self._marks:  # noqa: SIM110 (a generator each record is what this saves)
            if mark in payload:
                return False
        return True

    def _framed(self, payloads: Sequence[bytes]) -> bytes:
        """Of the last chunk only some records may go on: they are written anew."""
        self._held.clear()
        return b"".join(map(self._dialect.frame, payloads))

    def _whole_records(self, chunk: bytes, some_ended: bool) -> bytes:
        """The bytes up to the last record's end; the rest is held."""
        pending, held = self._records.pending, self._held
        if not pending and not held:
            return chunk
        held.append(chunk)
        if pending and not some_ended:
            return b""
        joined = b"".join(held)
        cut = len(joined) - pending
        if pending and self._dialect.framing == "sse" and b"\r" in joined:
            cut = _behind_last_blank_line(joined)  # `pending` counts a CRLF as one
        self._held = [joined[cut:]] if cut < len(joined) else []
        return joined[:cut]

    def _look_at(self, payload: bytes) -> bool:
        """Whether the record may go on."""
        if self._dialect.keeps_first and not self._first:
            self._first.append(payload)
        self.last.append(payload)
        verdict = self._verdict(payload)
        if verdict is Verdict.CONTENT:
            self.content_seen = True
        elif verdict is Verdict.END:
            self._ending = self._dialect.ending((*self._first, *self.last))
            if self._ending.how != "complete":
                self.failed = Verdict.MALFORMED
                return False
            self.content_seen = self.ended = True
        elif verdict is not Verdict.SILENT:
            self.failed = verdict
            return False
        return True

    def _verdict(self, payload: bytes) -> Verdict:
        if self.content_seen and self._is_plain(payload):
            return Verdict.CONTENT
        return self._dialect.judge(payload)

    def finish(self) -> tuple[bytes, Ending]:
        """The body ended properly: what is left to forward, and how the answer ended."""
        tail = b""
        if self.failed is None and not self.ended:
            rest = self._records.rest()
            if rest and self._look_at(rest):
                tail = rest  # NDJSON: the last line came without its line feed, and goes so
        if self.failed is not None:
            return tail, self.failure()
        return tail, self._ending or self._dialect.ending((*self._first, *self.last))

    def failure(self) -> Ending:
        """What the failed record says, for the caller and the trace."""
        if self.failed is Verdict.ERROR and self.last:
            return Ending("error", message=base.error_text(self.last[-1]))
        if self._ending is not None:
            return Ending("error", message=self._ending.message or "the node ended its answer too early")
        return Ending("error", message=base.UNREADABLE)


def _behind_last_blank_line(data: bytes) -> int:
    """Where the first SSE event begins that has not ended. LF, CR and CRLF end lines."""
    at = max(data.rfind(b"\n\n"), data.rfind(b"\r\r"), data.rfind(b"\n\r")) + 2
    if at < 2:
        return 0
    return at + 1 if data[at - 1 : at + 1] == b"\r\n" else at
