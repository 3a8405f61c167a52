"""One question to a router, as a client would put it; the answer is shown as it comes."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from herd.errors import HerdError, NotReachable

QUESTION = "Say hello to your new herd of machines in one short sentence."
_MAX_TOKENS = 60


class Answer(NamedTuple):
    """What served it and how fast. Rates are None where the answer was too short to tell."""

    node: str
    model: str
    score: str
    first_token_s: float
    tokens: int
    tokens_per_s: float | None


def ask(base_url: str, model: str, say: Callable[[str], None], timeout_s: float = 330.0) -> Answer:
    """Stream one chat. Raises NotReachable, or HerdError with the router's own sentence."""
    where = urlsplit(base_url)
    connection = http.client.HTTPConnection(where.hostname or "127.0.0.1", where.port, timeout=timeout_s)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": _MAX_TOKENS,
    }
    began_s = time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise HerdError(_error(response.read()))
        return _stream(response, say, began_s)
    except (OSError, http.client.HTTPException) as error:
        raise NotReachable(f"The router at {base_url} did not answer: {error}.") from error
    finally:
        connection.close()


def first_model(base_url: str) -> str | None:
    """A model that can chat, loaded ones first; None while there is none."""
    where = urlsplit(base_url)
    for path in ("/api/ps", "/api/tags"):
        connection = http.client.HTTPConnection(where.hostname or "127.0.0.1", where.port, timeout=10)
        try:
            connection.request("GET", path)
            models = json.loads(connection.getresponse().read())["models"]
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise NotReachable(f"The router at {base_url} did not answer: {error}.") from error
        finally:
            connection.close()
        for model in models:
            if "completion" in model.get("capabilities", ["completion"]):
                return str(model["name"])
    return None


def _stream(response: http.client.HTTPResponse, say: Callable[[str], None], began_s: float) -> Answer:
    first_s: float | None = None
    last_s = began_s
    tokens = 0
    for line in response:
        payload = line.removeprefix(b"data: ").strip()
        if not payload.startswith(b"{"):
            continue
        record = json.loads(payload)
        if "error" in record:
            raise HerdError(str(record["error"].get("message", record["error"])))
        if record.get("usage"):
            tokens = record["usage"].get("completion_tokens", 0)
        for choice in record.get("choices") or ():
            text = choice.get("delta", {}).get("content")
            if text:
                last_s = time.perf_counter()
                first_s = first_s if first_s is not None else last_s
                say(text)
    head = response.headers
    decode_s = last_s - first_s if first_s is not None else 0.0
    return Answer(
        node=head.get("X-Fleet-Node", "?"),
        model=head.get("X-Fleet-Model", "?"),
        score=head.get("X-Fleet-Score", "?"),
        first_token_s=(first_s if first_s is not None else last_s) - began_s,
        tokens=tokens,
        tokens_per_s=(tokens - 1) / decode_s if tokens > 1 and decode_s > 0 else None,
    )


def _error(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return body[:300].decode("utf-8", "replace")
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
