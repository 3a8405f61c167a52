"""docs/openapi.yaml and the code say the same: paths, methods, which bodies are taken, how errors look."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import openapi_spec_validator
import orjson
import pytest

from herd import errors
from herd.dialects import DIALECT_BY_PATH
from herd.errors import ApiError
from herd.web.routes import ROUTES
from herd_node.protocol.routes import FORWARDED, OFFERED_BY, Route
from tests import api_page

WITH_BODY = [route for route in ROUTES if api_page.json_body(route) and api_page.examples(route)]
READ_BY_US = [route for route in FORWARDED if route.model_at == "body"]
#: One of each JSON type, empty and not, and lists of each.
_ONES: tuple[Any, ...] = (None, True, False, 0, 7, -1, 1.5, "", "x", {}, {"a": 1}, {"text": "x"})
VALUES: tuple[Any, ...] = (*_ONES, [], *([one] for one in _ONES), [["x"]], ["x", 7], [{"text": 7}])


def test_the_page_is_openapi() -> None:
    openapi_spec_validator.validate(api_page.page())


def test_the_page_has_every_path_and_method_and_none_more() -> None:
    ours = {(method, api_page.path_of(route)) for route in ROUTES for method in route.methods}
    assert api_page.operations() == ours


def test_no_operation_has_the_id_of_another() -> None:
    ids = [api_page.operation(*one)["operationId"] for one in api_page.operations()]
    assert len(ids) == len(set(ids))


def test_every_part_of_the_page_is_used() -> None:
    text = api_page.FILE.read_text(encoding="utf-8")
    parts = [(kind, name) for kind, named in api_page.page()["components"].items() for name in named]
    assert [f"{kind}/{name}" for kind, name in parts if f'"#/components/{kind}/{name}"' not in text] == []


def test_only_what_not_every_backend_has_is_said_to_be_501() -> None:
    """And the count of tokens is never: the router estimates."""
    for path in OFFERED_BY:
        responses = api_page.operation("POST", path)["responses"]
        assert ("501" in responses) == (path != "/v1/messages/count_tokens")


# ---- requests: the schema takes what the router takes, and nothing else


def nodes_of(value: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (key,)
        yield from ((key, *rest) for rest in nodes_of(part))


def changed(body: dict[str, Any], way: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    part: Any = body
    for key in way[:-1]:
        part = part[key]
    part[way[-1]] = value
    return body


def lacking(body: dict[str, Any], way: tuple[Any, ...]) -> dict[str, Any]:
    body = copy.deepcopy(body)
    part: Any = body
    for key in way[:-1]:
        part = part[key]
    del part[way[-1]]
    return body


def variants(route: Route) -> Iterator[dict[str, Any]]:
    """Each example, with each of its parts taken out or made into each other type, and with each field of the
    schema that it lacks."""
    for body in api_page.examples(route):
        yield body
        for way in (*nodes_of(body), *((field,) for field in api_page.fields(route) - set(body))):
            for value in VALUES:
                yield changed(body, way, value)
        for way in nodes_of(body):
            yield lacking(body, way)


@pytest.mark.slow
@pytest.mark.parametrize("route", READ_BY_US, ids=lambda route: route.path)
def test_the_page_takes_the_bodies_that_the_router_takes(route: Route) -> None:
    parse = DIALECT_BY_PATH[route.path].parse
    taken, differ = {True: 0, False: 0}, []
    for body in variants(route):
        try:
            parse(route, orjson.dumps(body))
            ours = True
        except ApiError:
            ours = False
        taken[ours] += 1
        if api_page.takes(route, body) != ours:
            differ.append((body, "the router takes it" if ours else "the router refuses it"))
    assert differ == []
    assert min(taken.values()) > 40


@pytest.mark.parametrize("route", WITH_BODY, ids=lambda route: route.path)
def test_the_pages_own_examples_are_taken(route: Route) -> None:
    assert [body for body in api_page.examples(route) if not api_page.takes(route, body)] == []


def test_every_body_has_an_example() -> None:
    assert {route.path for route in READ_BY_US} <= {route.path for route in WITH_BODY}


# ---- errors

SAMPLES: tuple[ApiError, ...] = (
    errors.BadRequest("no"),
    errors.ModelNotFound("no", model="m"),
    errors.BodyTooLarge("no"),
    errors.UnsupportedEncoding("no"),
    errors.MethodNotAllowed("no", allow="GET"),
    errors.Forbidden("no"),
    errors.NotOffered("no"),
    errors.Saturated("no", retry_after_s=2),
    errors.UpstreamFailed("no"),
    errors.UpstreamTimeout("no"),
    *(
        errors.BackendRefused(status, "no", retry_after_s=2)
        for status in (400, 402, 405, 409, 413, 415, 422, 429)
    ),
)


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: f"{type(error).__name__}-{error.status}")
@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
def test_every_error_looks_as_the_page_says(route: Route, error: ApiError) -> None:
    if route.kind == "count" and isinstance(error, errors.NotOffered):
        return
    dialect = DIALECT_BY_PATH[route.path]
    headers = {"content-type": "application/json", "x-request-id": "0" * 24, "x-fleet-attempts": "0"}
    if error.retry_after_s:
        headers["retry-after"] = str(error.retry_after_s)
    body = dialect.error_body(error, "0" * 24)
    assert api_page.complaints("POST", route.path, dialect.status(error), headers, body) == []


def test_an_answer_that_is_not_as_the_page_says_is_found() -> None:
    headers = {"content-type": "application/json", "x-request-id": "0" * 24, "x-fleet-attempts": "0"}
    good = b'{"error":{"message":"m","type":"invalid_request_error","param":null,"code":null}}'

    def look(status: int, body: bytes, **more: str) -> list[str]:
        shown = headers | {name.replace("_", "-"): text for name, text in more.items()}
        return api_page.complaints("POST", "/v1/chat/completions", status, shown, body)

    assert look(400, good) == []
    assert look(500, good) == ["status 500 is not on the page"]
    assert look(502, good) != []  # another type and code
    assert look(400, b'{"error":"m"}') != []
    assert look(400, b"<html>") != []
    assert look(400, good, x_fleet_attempts="x") == ["header X-Fleet-Attempts is 'x'"]
    assert look(400, good, content_type="text/html") != []
