"""Errors as each dialect writes them: the table of docs/behaviour.md, row by row."""

from __future__ import annotations

import orjson
import pytest

from herd import errors
from herd.dialects import OLLAMA, OPENAI
from herd.errors import ApiError

#: error, status, OpenAI's type and code
ROWS: list[tuple[ApiError, int, str, str | None]] = [
    (errors.BadRequest("x"), 400, "invalid_request_error", None),
    (errors.Forbidden("x"), 403, "permission_error", None),
    (errors.ModelNotFound("model 'x' not found"), 404, "invalid_request_error", "model_not_found"),
    (errors.NotFound("x"), 404, "invalid_request_error", None),
    (errors.MethodNotAllowed("x", allow="GET"), 405, "invalid_request_error", None),
    (errors.BodyTooLarge("x"), 413, "invalid_request_error", "request_too_large"),
    (errors.UnsupportedEncoding("x"), 415, "invalid_request_error", None),
    (errors.BackendRefused(400, "x"), 400, "invalid_request_error", None),
    (errors.BackendRefused(422, "x"), 422, "invalid_request_error", None),
    (errors.BackendRefused(429, "x"), 429, "rate_limit_error", None),
    (errors.UpstreamFailed("x"), 502, "server_error", "upstream_failed"),
    (errors.Saturated("x"), 503, "server_error", "overloaded"),
    (errors.UpstreamTimeout("x"), 504, "server_error", "timeout"),
    (errors.ApiError("x"), 500, "server_error", None),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), ROWS)
def test_an_error_has_the_shape_of_each_dialect(error: ApiError, status: int, kind: str, code: str | None):
    expected = {"error": {"message": error.message, "type": kind, "param": None, "code": code}}
    assert error.status == status
    assert orjson.loads(OPENAI.error_body(error, "id")) == expected
    assert orjson.loads(OLLAMA.error_body(error, "id")) == {"error": error.message}


@pytest.mark.parametrize(("error", "_status", "_kind", "_code"), ROWS)
def test_an_error_record_is_one_record_and_no_end_mark(error: ApiError, _status: int, _kind: str, _code: str):
    event = OPENAI.error_record(error)
    assert (event[:6], event[-2:], event.count(b"\n")) == (b"data: ", b"\n\n", 2)
    assert orjson.loads(event[6:]) == orjson.loads(OPENAI.error_body(error, None))
    line = OLLAMA.error_record(error)
    assert (line[-1:], line.count(b"\n")) == (b"\n", 1)
    assert orjson.loads(line) == {"error": error.message}


def test_a_message_with_line_breaks_stays_one_record():
    error = errors.UpstreamFailed("a\n\ndata: [DONE]\r\n\r\n")
    assert OPENAI.error_record(error).count(b"\n") == 2
    assert OLLAMA.error_record(error).count(b"\n") == 1
