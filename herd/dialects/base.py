"""What every dialect has in common: the row of functions, the reading of JSON, and the watch over a stream.

Nothing here trusts a backend: whatever it sends, the worst that comes of it is an `Ending` that says so. The
watch parses the first content record, the last few, and those that might be an error or the end; no others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import orjson

from herd.errors import ApiError, BadRequest
from herd.request import PrefixMark
from herd_node.protocol import jsonedit, names
from herd_node.protocol.framing import MAX_RECORD_BYTES, FramingError, Records
from herd_node.protocol.routes import Route

#: Bytes of text a token, and what an image costs (docs/scheduling.md §1).
_BYTES_PER_TOKEN = 3.6
_BYTES_PER_TOKEN_NON_ASCII = 2.0
_TOKENS_PER_IMAGE = 600.0
#: A completion prompt has no messages: its prefix chain is cut every so many characters.
_PROMPT_BLOCK_CHARS = 2048
#: Of longer parts only both ends are hashed: a wrong guess costs an estimate, hashing megabytes costs time.
_HASHED_WHOLE_CHARS = 65536
#: Fields that reach into a backend's slots and files (docs/behaviour.md, refused fields).
_REFUSED_FIELDS = frozenset({"n_discard", "id_slot", "slot_save_path", "slot_restore_path"})


class Verdict(Enum):
    """What one record of a stream is."""

    SILENT = "silent"
    CONTENT = "content"
    END = "end"
    ERROR = "error"
    MALFORMED = "malformed"


How = Literal["complete", "repeat_abort", "truncated", "error"]


class Ending(NamedTuple):
    """How an answer ended, and what it said about itself. Unknown numbers are None, never 0."""

    how: How
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    load_ms: float | None = None
    no_output: bool = False
    message: str | None = None


class Parsed(NamedTuple):
    """A request's head as the dialect reads it; `herd.web.inference` makes the InferenceRequest of it."""

    asked: tuple[str, ...]
    stream: bool
    est_tokens: float
    max_tokens: int | None
    wanted_context_tokens: int | None
    needs: frozenset[str]
    prefixes: tuple[PrefixMark, ...]
    buffered: bool
    user: str | None
    tags: tuple[str, ...]
    model_span: tuple[int, int] | None


class Dialect(NamedTuple):
    """One row of functions. `error_record` is what a stream ends with when it broke after content."""

    name: str
    framing: Literal["sse", "ndjson"]
    stream_type: bytes
    marks: tuple[bytes, ...]
    """A record after the first content that holds none of these is content, unread."""
    parse: Callable[[Route, bytes], Parsed]
    error_body: Callable[[ApiError, str | None], bytes]
    error_record: Callable[[ApiError], bytes]
    judge: Callable[[bytes], Verdict]
    ending: Callable[[Sequence[bytes]], Ending]
    whole: Callable[[Route, bytes], Ending]
    proper_end: Callable[[Sequence[bytes]], bytes]
    """What turns a stream that Ollama stopped on a repeated token into a properly ended one."""
    frame: Callable[[bytes], bytes]


class StreamWatch:
    """Watches one answer's records go by. `feed` returns the bytes that may go on: whole records only.

    A record cut by a chunk border is kept until it is whole, so that an error record can follow at any time.
    What comes behind the end mark is dropped: an answer has one end.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._records = Records(dialect.framing)
        self._held: list[bytes] = []
        self._ending: Ending | None = None
        self.last: deque[bytes] = deque(maxlen=4)
        self.content_seen = False
        self.ended = False
        """The end mark has come, and the answer is complete."""
        self.failed: Verdict | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Take what came; return what may be forwarded. Sets `content_seen`, `ended`, `failed`."""
        if self.failed is not None or self.ended:
            return b""
        try:
            payloads = self._records.feed(chunk)
            if len(chunk) > MAX_RECORD_BYTES:
                self._records.feed(b"")  # a record of this very chunk may have been too long
        except FramingError:
            self.failed = Verdict.MALFORMED
            return b""
        for index, payload in enumerate(payloads):
            if not self._look_at(payload):
                return self._framed(payloads[:index])
            if self.ended and (index + 1 < len(payloads) or self._records.pending):
                return self._framed(payloads[: index + 1])
        return self._whole_records(chunk, bool(payloads))

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
        self.last.append(payload)
        verdict = self._verdict(payload)
        if verdict is Verdict.CONTENT:
            self.content_seen = True
        elif verdict is Verdict.END:
            self._ending = self._dialect.ending(tuple(self.last))
            if self._ending.how != "complete":
                self.failed = Verdict.MALFORMED
                return False
            self.content_seen = self.ended = True
        elif verdict is not Verdict.SILENT:
            self.failed = verdict
            return False
        return True

    def _verdict(self, payload: bytes) -> Verdict:
        if self.content_seen and payload[:1] == b"{" and payload[-1:] == b"}":
            for mark in self._dialect.marks:
                if mark in payload:
                    break
            else:
                return Verdict.CONTENT
        return self._dialect.judge(payload)

    def finish(self) -> tuple[bytes, Ending]:
        """The body ended properly: what is left to forward, and how the answer ended."""
        tail = b""
        if self.failed is None and not self.ended:
            rest = self._records.rest()
            if rest and self._look_at(rest):
                tail = self._dialect.frame(rest)
        if self.failed is not None:
            return tail, self.failure()
        return tail, self._ending or self._dialect.ending(tuple(self.last))

    def failure(self) -> Ending:
        """What the failed record says, for the caller and the trace."""
        if self.failed is Verdict.ERROR and self.last:
            return Ending("error", message=error_text(self.last[-1]))
        if self._ending is not None:
            return Ending("error", message=self._ending.message or "the node ended its answer too early")
        return Ending("error", message=UNREADABLE)


UNREADABLE = "the node sent a record that cannot be read"


def _behind_last_blank_line(data: bytes) -> int:
    """Where the first SSE event begins that has not ended. LF, CR and CRLF end lines."""
    at = max(data.rfind(b"\n\n"), data.rfind(b"\r\r"), data.rfind(b"\n\r")) + 2
    if at < 2:
        return 0
    return at + 1 if data[at - 1 : at + 1] == b"\r\n" else at


def read_record(payload: bytes) -> dict[str, Any] | None:
    """One record as an object; None when it is none."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def mapping(value: object) -> dict[str, Any]:
    """A backend's object, or an empty one where it sent something else."""
    return value if isinstance(value, dict) else {}


def count(value: object) -> int | None:
    """A backend's counter, or None where it sent something else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def milliseconds(value: object, scale: float = 1.0) -> float | None:
    """A backend's duration, or None where it sent something else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return None
    return value * scale


def error_text(payload: bytes) -> str:
    """The sentence inside a backend's error object, of whatever dialect."""
    value = read_record(payload)
    if value is None:
        return payload[:300].decode("utf-8", "replace")
    error = value.get("error") or value.get("message")
    if isinstance(error, dict):
        error = error.get("message")
    return str(error)[:2000] if error else "the node reported an error without a text"


def read_object(body: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises BadRequest for anything else."""
    if not body.strip():
        raise BadRequest("missing request body")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(value)}")
    for container in (value, value.get("options")):
        refused = _REFUSED_FIELDS & container.keys() if isinstance(container, dict) else None
        if refused:
            raise BadRequest(f"field '{min(refused)}' is not accepted: it reaches into a node's slots")
    return value


def model_span(body: bytes, key: str = "model") -> tuple[int, int] | None:
    """Where the value of the top-level model field lies. Two of them, in any letter case, are refused."""
    try:
        return jsonedit.find_top_level(body, key)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def model_names(value: dict[str, Any], key: str, missing: ApiError) -> tuple[str, ...]:
    """The chain as the caller wrote it: the model, then `fallback_models`."""
    model = value.get(key)
    if model is None or model == "":
        raise missing
    if not isinstance(model, str):
        raise BadRequest(f"'{key}' must be a string, not {json_type(model)}")
    fallbacks = value.get("fallback_models")
    if fallbacks is None:
        fallbacks = []
    if not isinstance(fallbacks, list) or not all(isinstance(name, str) for name in fallbacks):
        raise BadRequest("'fallback_models' must be a list of strings")
    if len(fallbacks) > 16:
        raise BadRequest("'fallback_models' has more than 16 names")
    for name in (model, *fallbacks):
        if not names.is_model_name(name):
            raise BadRequest("invalid model name")
    return (model, *fallbacks)


def optional(value: dict[str, Any], key: str, kind: type | tuple[type, ...], expected: str) -> Any:  # noqa: ANN401
    """A field that may be absent or null; anything but `kind` is a BadRequest that names it."""
    found = value.get(key)
    if found is None:
        return None
    if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
        raise BadRequest(f"'{key}' must be {expected}, not {json_type(found)}")
    return found


def objects(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects (messages, tools); absent or null is an empty list."""
    found = optional(value, key, list, "a list")
    if found is None:
        return []
    for item in found:
        if not isinstance(item, dict):
            raise BadRequest(f"'{key}' must be a list of objects; it holds {json_type(item)}")
    return list(found)


def positive(value: object) -> int | None:
    """A caller's token limit, or None where it sets none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def tags_of(value: dict[str, Any]) -> tuple[str, ...]:
    """`metadata.tags`: a list of strings or one string; anything else is ignored, it is not ours alone."""
    metadata = value.get("metadata")
    tags = metadata.get("tags") if isinstance(metadata, dict) else None
    if isinstance(tags, str):
        tags = [part.strip() for part in tags.split(",")]
    if not isinstance(tags, list):
        return ()
    return tuple(tag[:64] for tag in tags if isinstance(tag, str) and tag)[:16]


def json_type(value: object) -> str:
    """How a JSON value is called in a sentence."""
    table: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else table[type(value)]


class Prompt:
    """Counts a prompt's tokens and chains its digests, message by message."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=12)
        self._bytes = 0
        self._characters = 0
        self.images = 0
        self.marks: list[PrefixMark] = []

    @property
    def tokens(self) -> float:
        """Estimated tokens so far (docs/scheduling.md §1)."""
        non_ascii = self._bytes > 1.5 * self._characters
        per_token = _BYTES_PER_TOKEN_NON_ASCII if non_ascii else _BYTES_PER_TOKEN
        return self._bytes / per_token + self.images * _TOKENS_PER_IMAGE

    def text(self, text: str) -> None:
        """Some text of the message in work."""
        self._characters += len(text)
        if len(text) > _HASHED_WHOLE_CHARS:
            self._bytes += len(text) if text.isascii() else len(text.encode())
            half = _HASHED_WHOLE_CHARS // 2
            self._hash.update(f"{len(text)}\0{text[:half]}\0{text[-half:]}".encode())
            return
        data = text.encode()
        self._bytes += len(data)
        self._hash.update(data)

    def value(self, value: object) -> None:
        """JSON that counts as text: tools, schemas, tool calls."""
        try:
            self.text(orjson.dumps(value).decode())
        except TypeError as error:  # it reads 1,024 levels and writes 254
            raise BadRequest("the request is nested too deeply") from error

    def image(self, reference: str) -> None:
        """One image; its data is hashed at both ends only."""
        self.images += 1
        self._hash.update(f"{len(reference)}\0{reference[:256]}\0{reference[-256:]}".encode())

    def mark(self) -> None:
        """The message ends here."""
        self.marks.append(PrefixMark(self._hash.copy().digest(), self.tokens))
        self._hash.update(b"\x1e")

    def blocks(self, text: str) -> None:
        """A prompt without messages, marked block by block."""
        if len(text) > 64 * _PROMPT_BLOCK_CHARS:
            self.text(text)
            self.mark()
            return
        for start in range(0, len(text), _PROMPT_BLOCK_CHARS):
            self.text(text[start : start + _PROMPT_BLOCK_CHARS])
            self.mark()
