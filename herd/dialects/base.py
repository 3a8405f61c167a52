"""What every dialect has in common: the row of functions, and the reading of JSON in both directions.

Nothing here trusts a backend: whatever it sends, the worst that comes of it is an `Ending` that says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from enum import Enum
from hashlib import blake2b
from operator import attrgetter
from typing import Any, Literal, NamedTuple, NoReturn

import orjson

from herd.errors import ApiError, BadRequest
from herd.request import Fallback, LoadOptions, PrefixMark
from herd_node.protocol import jsonedit, names
from herd_node.protocol.routes import Route

#: Bytes of text a token, and what an image costs (docs/scheduling.md §1).
_BYTES_PER_TOKEN = 3.6
_BYTES_PER_TOKEN_NON_ASCII = 2.0
_TOKENS_PER_IMAGE = 600.0
#: A completion prompt has no messages: its prefix chain is cut every so many characters.
_PROMPT_BLOCK_CHARS = 2048
#: Of longer parts only both ends are hashed: a wrong guess costs an estimate, hashing megabytes costs time.
_HASHED_WHOLE_CHARS = 65536
#: From which size on a body is parsed without the middle of its long strings, and what a long one is.
_CUT_BODY_BYTES = 256 * 1024
_CUT_STRING_BYTES = 128 * 1024
_KEPT_BYTES = _HASHED_WHOLE_CHARS // 2
#: Stands for the middle: NUL, how many characters it had, NUL.
_LEFT_OUT = re.compile("\0([0-9]+)\0")
#: Fields that reach into a backend's slots and files (docs/behaviour.md, refused fields).
_REFUSED_FIELDS = frozenset({"n_discard", "id_slot", "slot_save_path", "slot_restore_path"})
#: What is said beside the question itself (`asides`). Hardly any request has one of them.
_ASIDES = frozenset({"user", "metadata", "fallback"})


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
    model_key: str
    """The field that names the model; it stands in the body once."""
    load_options: LoadOptions = ()
    fallback: Fallback = "default"


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
    status: Callable[[ApiError], int] = attrgetter("status")
    """Of an answer that is an error."""
    keeps_first: bool = False
    """`ending` wants the stream's first record beside the last ones."""
    event: bytes = b""
    """The name under which a stream's content comes; empty where events have none."""
    ping: bytes = b""
    """What keeps a silent stream alive; empty where that would be a record."""
    error_type: type | None = None
    """What the `error` of a backend's refusal must be, so that it goes on as it came; None: it never does."""
    progress: Callable[[Route, str, str, float], bytes] | None = None
    """What a caller waits for as a record of reasoning: of the route, model, text, and wall time; b"" where a
    stream of that kind has no place for it."""
    guess: Callable[[float], bytes] | None = None
    """The answer to a count of tokens that nobody could make, from the estimate."""


UNREADABLE = "the node sent a record that cannot be read"


def read_record(payload: bytes) -> dict[str, Any] | None:
    """One record as an object; None when it is none."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        value = _with_lone_surrogates(payload)
    return value if isinstance(value, dict) else None


def _with_lone_surrogates(payload: bytes) -> object:
    """Half of an emoji, written as an escape, is JSON by its grammar: a token may end there."""
    if b"\\u" not in payload:
        return None
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        return None


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


def has_error(body: bytes, kind: type | None) -> bool:
    """Whether it is an error as a dialect writes it."""
    value = read_record(body)
    return kind is not None and value is not None and isinstance(value.get("error"), kind)


def with_status(record: bytes, status: int) -> bytes:
    """An error record, with the status that the answer would have had as its code."""
    start = record.index(b"{")
    text = record[start:].rstrip(b"\n")
    value = orjson.loads(text)
    error = value.get("error")
    (error if isinstance(error, dict) else value)["code"] = status
    return record[:start] + orjson.dumps(value) + record[start + len(text) :]


def error_text(payload: bytes) -> str:
    """The sentence inside a backend's error object, of whatever dialect."""
    value = read_record(payload)
    if value is None:
        return payload[:300].decode("utf-8", "replace")
    error = value.get("error") or value.get("message") or mapping(value.get("response")).get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return str(error)[:2000] if error else "the node reported an error without a text"


class Head(NamedTuple):
    """A body as read. `cut`: long strings lack their middle, and `text` is what was parsed in its stead."""

    value: dict[str, Any]
    text: bytes
    cut: bool


def read_object(body: bytes) -> Head:
    """The body as a JSON object. Raises BadRequest for anything else."""
    head = _read_cut(body) if len(body) > _CUT_BODY_BYTES else None
    if head is None:
        head = _read_whole(body)
    value = head.value
    if not _REFUSED_FIELDS.isdisjoint(value):
        _refuse_field(value)
    if "options" in value and not _REFUSED_FIELDS.isdisjoint(options := mapping(value["options"])):
        _refuse_field(options)
    return head


def _refuse_field(container: dict[str, Any]) -> NoReturn:
    refused = min(_REFUSED_FIELDS & container.keys())
    raise BadRequest(f"field '{refused}' is not accepted: it reaches into a node's slots")


def _read_whole(body: bytes) -> Head:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not body.strip():
            raise BadRequest("missing request body") from error
        raise BadRequest(f"the body is not valid JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(value)}")
    return Head(value, body, cut=False)


def _read_cut(body: bytes) -> Head | None:
    """A large body without the middle of its long strings (images): what is left out is never looked at.

    None where that could make a difference, and the whole body is parsed:
    1. nothing is long; 2. an escape could write our own mark, or tags have to be counted; 3. what is left is
    not a JSON object: the sentence about it comes from the whole.
    What is left out is ASCII without quote and backslash, so what is accepted is what a parser of the whole
    accepts, but for control characters there: the backend refuses those.
    """
    spans = _long_strings(body)
    if not spans:
        return None
    pieces: list[bytes] = []
    end = 0
    for start, stop in spans:
        pieces += (body[end:start], b"\\u0000%d\\u0000" % (stop - start))
        end = stop
    pieces.append(body[end:])
    if any(b'"tags"' in piece or jsonedit.ESCAPED_ASCII.search(piece) for piece in pieces[::2]):
        return None
    text = b"".join(pieces)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return Head(value, text, cut=True) if isinstance(value, dict) else None


def _long_strings(body: bytes) -> list[tuple[int, int]]:
    """The middles of the long strings that are ASCII and hold no escape, in order. O(n), at memchr's speed.

    A long string has no quote inside, so of two probes half its length apart one finds none near.
    """
    found, position, stride = [], 0, _CUT_STRING_BYTES // 2
    known, inside, ascii_only = 0, False, body.isascii()  # whether `known` lies in a string
    while position < len(body):
        if body.find(b'"', position, position + stride) >= 0:
            position += stride
            continue
        start, stop = body.rfind(b'"', 0, position) + 1, body.find(b'"', position)
        if stop < 0 or start == 0:
            break
        position = stop
        if stop - start <= _CUT_STRING_BYTES or body.find(b"\\", start, stop) >= 0:
            continue
        inside ^= _quotes(body[known:start]) % 2 == 1
        known = stop
        if inside and (ascii_only or body[start:stop].isascii()):
            found.append((start + _KEPT_BYTES, stop - _KEPT_BYTES))
    return found


def _quotes(piece: bytes) -> int:
    """How many quotes begin or end a string: those that no backslash escapes."""
    if b"\\" not in piece:
        return piece.count(b'"')
    piece = piece.replace(b"\\\\", b"")
    return piece.count(b'"') - piece.count(b'\\"')


def refuse_twins(head: Head, key: str) -> None:
    """Two model fields, in any letter case, are refused: Go matches `MODEL` too, and others do not.
    So is `STREAM`: a backend would stream an answer that is not expected to.
    """
    others = [name.casefold() for name in head.value if name != key]
    if "stream" in others and (others.count("stream") > 1 or "stream" not in head.value):
        raise BadRequest("the field 'stream' must be written so, in small letters and once")
    try:
        jsonedit.refuse_twins(head.text, others, key)
    except ValueError as error:
        raise BadRequest(str(error)) from error


def model_names(value: dict[str, Any], key: str, missing: Callable[[], ApiError]) -> tuple[str, ...]:
    """The chain as the caller wrote it: the model, then `fallback_models`."""
    model = value.get(key)
    if model is None or model == "":
        raise missing()
    if not isinstance(model, str):
        raise BadRequest(f"'{key}' must be a string, not {json_type(model)}")
    fallbacks = value.get("fallback_models")
    if fallbacks is None:
        fallbacks = ()
    elif not isinstance(fallbacks, list) or not all(isinstance(name, str) for name in fallbacks):
        raise BadRequest("'fallback_models' must be a list of strings")
    if len(fallbacks) > 16:
        raise BadRequest("'fallback_models' has more than 16 names")
    asked = (model, *fallbacks)
    for name in asked:
        if not names.is_model_name(name):
            raise BadRequest("invalid model name")
    return asked


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
    found = value.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise BadRequest(f"'{key}' must be a list, not {json_type(found)}")
    for item in found:
        if not isinstance(item, dict):
            raise BadRequest(f"'{key}' must be a list of objects; it holds {json_type(item)}")
    return found


def needs(route: Route, *, tools: bool, images: bool, thinking: bool = False) -> frozenset[str]:
    """What the model must be able to do."""
    if not tools and not images and not thinking:
        return route.needs
    words = (("tools", tools), ("vision", images), ("thinking", thinking))
    return route.needs | {word for word, needed in words if needed}


class Asides(NamedTuple):
    """What a request says beside the question itself."""

    user: str | None = None
    tags: tuple[str, ...] = ()
    fallback: Fallback = "default"


_NONE_SAID = Asides()


def asides(value: dict[str, Any]) -> Asides:
    """Who asks, how it is tagged, and which other models may answer."""
    if _ASIDES.isdisjoint(value):
        return _NONE_SAID
    return Asides(_user_of(value), _tags_of(value), _fallback_of(value))


def _fallback_of(value: dict[str, Any]) -> Fallback:
    """`fallback`: false is the model that is named and no other, "loaded" one that is loaded, too."""
    found = value.get("fallback")
    if found is None or found is True:
        return "default"
    if found is False:
        return "none"
    if found != "loaded":
        raise BadRequest("'fallback' must be true, false or \"loaded\"")
    return "loaded"


def _user_of(value: dict[str, Any]) -> str | None:
    """Who is behind the request, as OpenAI's clients (`user`) and Anthropic's (`metadata.user_id`) say it."""
    user = value.get("user")
    if user is None and "metadata" in value:
        user = mapping(value["metadata"]).get("user_id")
    return user[:256] if isinstance(user, str) and user else None


def positive(value: object) -> int | None:
    """A caller's token limit, or None where it sets none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _tags_of(value: dict[str, Any]) -> tuple[str, ...]:
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
    """Counts a prompt's tokens and chains its digests, message by message.

    Of a `cut` body strings may lack their middle: they count and hash as if it were there.
    """

    __slots__ = ("_bytes", "_characters", "_cut", "_hash", "images", "marks")

    def __init__(self, *, cut: bool = False) -> None:
        self._hash = blake2b(digest_size=12)
        self._cut = cut
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
        if len(text) > _HASHED_WHOLE_CHARS:
            self._long_text(text)
            return
        data = text.encode()
        self._characters += len(text)
        self._bytes += len(data)
        self._hash.update(data)

    def message(self, role: str, text: str) -> None:
        """Who says it, and what is said."""
        if len(role) + len(text) > _HASHED_WHOLE_CHARS:
            self.text(role)
            self.text(text)
        else:
            self.text(role + text)

    def said(self, role: str, text: str) -> None:
        """A message that is text alone, from beginning to end: `message` and `mark` at half their cost."""
        characters = len(role) + len(text)
        if characters > _HASHED_WHOLE_CHARS:
            self.message(role, text)
            self.mark()
            return
        data = (role + text).encode()
        characters = self._characters = self._characters + characters
        size_bytes = self._bytes = self._bytes + len(data)
        per_token = _BYTES_PER_TOKEN_NON_ASCII if size_bytes > 1.5 * characters else _BYTES_PER_TOKEN
        self._hash.update(data)
        tokens = size_bytes / per_token + self.images * _TOKENS_PER_IMAGE
        self.marks.append(PrefixMark(self._hash.digest(), tokens))
        self._hash.update(b"\x1e")

    def _long_text(self, text: str) -> None:
        missing = self._missing(text)
        size, half = len(text) + missing, _HASHED_WHOLE_CHARS // 2
        self._characters += size
        self._bytes += missing + (len(text) if text.isascii() else len(text.encode()))
        self._hash.update(f"{size}\0{text[:half]}\0{text[-half:]}".encode())

    def _missing(self, text: str) -> int:
        """By how many characters the text is longer than it stands here."""
        if not self._cut:
            return 0
        return sum(int(mark[1]) - len(mark[0]) for mark in _LEFT_OUT.finditer(text, _KEPT_BYTES))

    def value(self, value: object) -> None:
        """JSON that counts as text: tools, schemas, tool calls."""
        try:
            text = orjson.dumps(value).decode()
        except TypeError as error:  # it reads 1,024 levels and writes 254
            raise BadRequest("the request is nested too deeply") from error
        self.text(text.replace("\\u0000", "\0") if self._cut else text)

    def image(self, reference: str) -> None:
        """One image; its data is hashed at both ends only."""
        self.images += 1
        size = len(reference) + self._missing(reference)
        self._hash.update(f"{size}\0{reference[:256]}\0{reference[-256:]}".encode())

    def mark(self) -> None:
        """The message ends here."""
        self.marks.append(PrefixMark(self._hash.digest(), self.tokens))
        self._hash.update(b"\x1e")

    def blocks(self, text: str) -> None:
        """A prompt without messages, marked block by block."""
        if len(text) + self._missing(text) > 64 * _PROMPT_BLOCK_CHARS:
            self.text(text)
            self.mark()
            return
        for start in range(0, len(text), _PROMPT_BLOCK_CHARS):
            self.text(text[start : start + _PROMPT_BLOCK_CHARS])
            self.mark()
