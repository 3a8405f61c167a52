"""What a backend's error means to the caller: status and sentence. Pure.

Both backends answer some of the client's mistakes with a 5xx (docs/backends.md). Told apart here, because a
router that takes them for the node's failure would try them on every node and call each of them broken.
"""

from __future__ import annotations

import re

import orjson

_MODEL_NOT_FOUND = re.compile(r"model '.*' not found", re.DOTALL)

_LLAMA_MISTAKE_STARTS = (
    "[json.exception",
    "Failed to parse tools: ",
    "Failed to parse messages: ",
    "'messages' is required",
)
_LLAMA_MISTAKE_PARTS = ("is not supported", "does not support", "too large to process", "must not be empty")
_OLLAMA_MISTAKE_STARTS = ('option "', "invalid format: ", "template: ", "the input length exceeds")
_SERVERS_FAULT = ("server_error", "api_error", "not_supported_error")
_NO_EMBEDDINGS = "This server does not support embeddings"
_TOO_LONG = "the input length exceeds the context length"


def translate_error(status: int, body: bytes, path: str) -> tuple[int, str]:
    """A llama-server error on upstream `path` → the status and sentence of the Ollama answer."""
    message = error_message(body) or f"the backend answered {status}"
    if status == 400 and _MODEL_NOT_FOUND.fullmatch(message):
        return 404, message
    if status == 500 and path.endswith("embeddings") and "too large to process" in message:
        return 400, _TOO_LONG
    return reclassify("llama-server", status, body), message


def reclassify(kind: str, status: int, body: bytes) -> int:
    """For answers passed through as they came: the client's mistakes that a backend calls 500 or 501 are 400.

    `kind` is the backend's. Of a server that is not known to do this, the status stays.
    """
    if status not in (500, 501):
        return status
    message = error_message(body)
    match kind:
        case "llama-server" | "llama-router":
            mistaken = status == 501 or _is_llama_mistake(message)
        case "ollama":
            runner_says = error_message(message.encode()) if message.startswith("{") else message
            mistaken = (
                message.startswith(_OLLAMA_MISTAKE_STARTS)
                or _NO_EMBEDDINGS in message
                or (runner_says != message and _is_llama_mistake(runner_says))
            )
        case _:
            mistaken = False
    return 400 if mistaken else status


def honest_error(kind: str, status: int, body: bytes) -> tuple[int, bytes]:
    """Status and body of a failure that is passed on; where the status changes, the body says so, too."""
    honest = reclassify(kind, status, body)
    if honest == status:
        return status, body
    error = orjson.loads(body)
    said = error.get("error")
    if not isinstance(said, dict):
        return honest, body
    if said.get("code") == status:
        said["code"] = honest
    if said.get("type") in _SERVERS_FAULT:
        said["type"] = "invalid_request_error"
    return honest, orjson.dumps(error)


def error_message(body: bytes) -> str:
    """The sentence in an error body of any dialect; "" if there is none."""
    try:
        error = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace").strip() if len(body) < 1024 else ""
    for name in ("error", "message"):
        if isinstance(error, dict):
            error = error.get(name)
    return error if isinstance(error, str) else ""


def error_answer(status: int, body: bytes, path: str) -> tuple[int, bytes]:
    """The status and the whole body of the Ollama answer to a failed upstream call.

    A success or a redirect that is here is not what was asked for: the backend's failure.
    """
    if status < 400:
        return 502, orjson.dumps({"error": "the backend answered with something else than was asked for"})
    status, message = translate_error(status, body, path)
    return status, orjson.dumps({"error": message})


def in_band_error(payload: bytes) -> tuple[int, str]:
    """An error event inside a stream: the status that it would have had, and its sentence."""
    return translate_error(error_status(payload), payload, "")


def error_status(payload: bytes) -> int:
    """The status that an error event says it would have had."""
    error = orjson.loads(payload).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def _is_llama_mistake(message: str) -> bool:
    return message.startswith(_LLAMA_MISTAKE_STARTS) or any(part in message for part in _LLAMA_MISTAKE_PARTS)
