"""Errors as each dialect writes them: the table of docs/behaviour.md, row by row."""

from __future__ import annotations

import orjson
import pytest

from herd import errors
from herd.dialects import ANTHROPIC, OLLAMA, OPENAI, RESPONSES
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
    (errors.NotOffered("x"), 501, "invalid_request_error", "not_offered"),
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


#: error, status, type in Anthropic's dialect
ANTHROPICS: list[tuple[ApiError, int, str]] = [
    (errors.BadRequest("x"), 400, "invalid_request_error"),
    (errors.Forbidden("x"), 403, "permission_error"),
    (errors.ModelNotFound("model 'x' not found"), 404, "not_found_error"),
    (errors.NotFound("x"), 404, "not_found_error"),
    (errors.MethodNotAllowed("x", allow="GET"), 405, "invalid_request_error"),
    (errors.BodyTooLarge("x"), 413, "request_too_large"),
    (errors.UnsupportedEncoding("x"), 415, "invalid_request_error"),
    (errors.BackendRefused(400, "x"), 400, "invalid_request_error"),
    (errors.BackendRefused(413, "x"), 413, "request_too_large"),
    (errors.BackendRefused(422, "x"), 422, "invalid_request_error"),
    (errors.BackendRefused(429, "x"), 429, "rate_limit_error"),
    (errors.NotOffered("x"), 501, "api_error"),
    (errors.UpstreamFailed("x"), 502, "api_error"),
    (errors.Saturated("x"), 529, "overloaded_error"),
    (errors.UpstreamTimeout("x"), 504, "timeout_error"),
    (errors.ApiError("x"), 500, "api_error"),
]


def test_the_table_of_anthropics_errors_knows_every_error():
    assert {(type(row[0]), row[1]) for row in ROWS} <= {(type(row[0]), row[0].status) for row in ANTHROPICS}


@pytest.mark.parametrize(("error", "status", "kind"), ANTHROPICS)
def test_an_error_has_anthropics_shape_status_and_type(error: ApiError, status: int, kind: str):
    expected = {"type": "error", "error": {"type": kind, "message": error.message}}
    assert ANTHROPIC.status(error) == status
    assert orjson.loads(ANTHROPIC.error_body(error, "id")) == {**expected, "request_id": "id"}
    head, data, *rest = ANTHROPIC.error_record(error).split(b"\n")
    assert (head, rest) == (b"event: error", [b"", b""])
    assert orjson.loads(data.removeprefix(b"data: ")) == expected


def test_other_dialects_keep_the_status_of_an_error():
    for error, status, _kind, _code in ROWS:
        assert OPENAI.status(error) == OLLAMA.status(error) == status


def test_a_response_that_broke_says_so_in_both_spellings_that_clients_look_for():
    head, data, *rest = RESPONSES.error_record(errors.UpstreamFailed("x")).split(b"\n")
    assert (head, rest) == (b"event: error", [b"", b""])
    event = orjson.loads(data.removeprefix(b"data: "))
    assert (event["type"], event["message"], event["code"]) == ("error", "x", "upstream_failed")
    assert event["error"] == orjson.loads(OPENAI.error_body(errors.UpstreamFailed("x"), None))["error"]
