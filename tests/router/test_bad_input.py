"""Whatever is wrong with a request, on whatever row of the table: 4xx at once, in the caller's dialect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest

from herd.web.routes import OWN, ROUTES
from herd_node.protocol.routes import FORWARDED, Route
from tests.dialects.test_parse import GOOD
from tests.router.kit import LLAMA, OLLAMA, QUESTIONS, TEXT, Answer, Fleet

MODELS = {route.path: "embed:1" if route.kind == "embedding" else OLLAMA for route in FORWARDED}


def good(route: Route, **changed: Any) -> dict[str, Any]:
    return GOOD[route.path] | {"model": MODELS[route.path]} | changed


def raw(route: Route, **changed: Any) -> bytes:
    return orjson.dumps(good(route, **changed))


def error_of(route: Route, answer: Answer) -> str:
    """The sentence, after a look at the shape."""
    assert answer.headers["content-type"] == "application/json", answer
    assert len(answer.headers["x-request-id"]) == 24
    assert answer.headers["x-fleet-attempts"] == "0"
    body = answer.json()
    if route.dialect == "openai":
        assert list(body) == ["error"]
        assert list(body["error"]) == ["message", "type", "param", "code"]
        assert body["error"]["type"] == "invalid_request_error"
    else:
        assert list(body) == ["error"]
    assert isinstance(answer.error, str)
    assert "\n" not in answer.error
    assert answer.error
    return answer.error


BAD: dict[str, tuple[int, Any]] = {
    "nothing": (400, lambda route: b""),
    "no json": (400, lambda route: b"model=m&prompt=hi"),
    "half a json": (400, lambda route: raw(route)[:-1]),
    "text behind it": (400, lambda route: raw(route) + b"x"),
    "not utf-8": (400, lambda route: raw(route)[:-1] + b',"x":"\xff\xfe"}'),
    "utf-16": (400, lambda route: raw(route).decode().encode("utf-16")),
    "byte order mark": (400, lambda route: b"\xef\xbb\xbf" + raw(route)),
    "nan": (400, lambda route: raw(route)[:-1] + b',"temperature":NaN}'),
    "lone surrogate": (400, lambda route: raw(route)[:-1] + b',"x":"\\ud800"}'),
    "too deep": (400, lambda route: raw(route)[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a list": (400, lambda route: b"[" + raw(route) + b"]"),
    "a string": (400, lambda route: b'"hi"'),
    "null": (400, lambda route: b"null"),
    "two models": (400, lambda route: raw(route)[:-1] + b',"MODEL":"x"}'),
    "model null": ((400, 404), lambda route: raw(route, model=None)),
    "model empty": ((400, 404), lambda route: raw(route, model="")),
    "model number": (400, lambda route: raw(route, model=7)),
    "model list": (400, lambda route: raw(route, model=["m"])),
    "model object": (400, lambda route: raw(route, model={"id": "m"})),
    "model with NUL": (400, lambda route: raw(route, model="m\x00n")),
    "model with surrogate": (400, lambda route: raw(route).replace(b'"model":"', b'"model":"\\udfff')),
    "model with spaces": (400, lambda route: raw(route, model="a model")),
    "model as markup": (400, lambda route: raw(route, model="<img src=x>")),
    "model as path": (400, lambda route: raw(route, model="../../etc/passwd")),
    "model too long": (400, lambda route: raw(route, model="m" * 10_000)),
    "unknown model": (404, lambda route: raw(route, model="nowhere:1")),
    "unknown model, any script": (404, lambda route: raw(route, model="не/здесь:名")),
    "stream as text": (400, lambda route: raw(route, stream="yes")),
    "stream as number": (400, lambda route: raw(route, stream=1)),
    "fallbacks as text": (400, lambda route: raw(route, fallback_models="m")),
    "fallbacks of numbers": (400, lambda route: raw(route, fallback_models=[1])),
}  # fmt: skip
BY_KIND: dict[str, dict[str, list[Any]]] = {
    "chat": {"messages": ["hi", 7, {"role": "user"}, ["hi"], [7], [None]], "tools": ["x", {"a": 1}, [7]]},
    "completion": {"prompt": [7, {"a": 1}, True, [None], [["a"]]], "suffix": [7, []]},
    "generate": {"prompt": [7, {"a": 1}, ["a"], True], "images": ["x", [7]], "options": ["x", 7, []]},
    "embedding": {"input": [7, {"a": 1}, True, [None], [{"a": 1}]]},
    "show": {"verbose": ["yes", 7]},
}


@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
async def test_bad_input_is_refused_at_once_in_the_dialect_of_the_row(fleet: Fleet, route: Route):
    loop = asyncio.get_running_loop()
    for name, (status, make) in BAD.items():
        began_s = loop.time()
        answer = await fleet.request(route.path, make(route))
        assert loop.time() - began_s < 2, name
        expected = status if isinstance(status, tuple) else (status,)
        assert answer.status in expected, (name, answer)
        error_of(route, answer)
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0


@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
async def test_a_field_of_the_wrong_type_is_refused(fleet: Fleet, route: Route):
    fields = BY_KIND[route.kind]
    if route.path == "/api/embeddings":
        fields = {"prompt": [7, {"a": 1}, ["a"], True]}
    for field, values in fields.items():
        for value in values:
            answer = await fleet.request(route.path, raw(route, **{field: value}))
            assert answer.status == 400, (field, value, answer)
            error_of(route, answer)
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0


@pytest.mark.parametrize("route", FORWARDED, ids=lambda route: route.path)
async def test_what_is_refused_after_its_model_was_understood_has_a_row(fleet: Fleet, route: Route):
    answer = await fleet.request(route.path, raw(route, model="nowhere:1"))
    assert answer.status == 404
    assert answer.headers["x-should-retry"] == "false"
    [row] = await fleet.check(answer)
    assert (row["status"], row["model"], row["original_format"]) == ("rejected", "nowhere:1", route.dialect)
    assert row["request_id"] == answer.headers["x-request-id"]


async def test_a_model_that_cannot_do_it_is_400_and_says_why(fleet: Fleet):
    cases = [
        ("/api/chat", {"model": "embed:1", "messages": [{"role": "user", "content": "x"}]}, "completion"),
        ("/api/embed", {"model": OLLAMA, "input": "x"}, "embedding"),
        ("/api/chat", {"model": OLLAMA, "messages": [], "tools": [{"type": "function"}]}, "tools"),
        ("/api/generate", {"model": LLAMA, "prompt": "x", "images": ["aGk="]}, "vision"),
        ("/api/generate", {"model": LLAMA, "prompt": "x", "options": {"num_ctx": 10**6}}, "context"),
    ]
    for path, body, word in cases:
        answer = await fleet.request(path, body)
        assert answer.status == 400, (path, body, answer)
        assert word in answer.error
        [row] = await fleet.check(answer)
        assert row["status"] == "rejected"
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0


@pytest.mark.parametrize("route", [FORWARDED[0], FORWARDED[3]], ids=lambda route: route.path)
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_413_and_can_be_read(fleet: Fleet, route: Route, chunked: bool):
    """Also by clients that send everything before they read."""
    body = raw(route, x="y" * 33 * 1024 * 1024)
    reader, writer = await fleet.connect()
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    writer.write(f"POST {route.path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    try:
        for at in range(0, len(body), 1 << 20):
            piece = body[at : at + (1 << 20)]
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        writer.write(b"0\r\n\r\n" if chunked else b"")
    except ConnectionError:
        pass  # it may hang up on us; the answer has been sent before
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        said = json.loads(await reader.read())
    assert head.startswith("http/1.1 413 ")
    assert "connection: close" in head
    error = said["error"]
    assert "33554432" in (error if isinstance(error, str) else error["message"])
    writer.transport.abort()
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0
    answer = await fleet.ask(QUESTIONS[0])
    assert answer.text == TEXT


async def test_a_large_body_within_the_limit_is_served(fleet: Fleet):
    body = {"model": OLLAMA, "prompt": "x" * 8 * 1024 * 1024, "stream": False}
    answer = await fleet.request("/api/generate", body)
    assert (answer.status, answer.text) == (200, TEXT)
    [row] = await fleet.check(answer)
    assert row["estimated_tokens"] > 2_000_000


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate, gzip"])
async def test_a_packed_body_is_415(fleet: Fleet, encoding: str):
    for route in FORWARDED:
        answer = await fleet.request(route.path, raw(route), headers={"Content-Encoding": encoding})
        assert answer.status == 415
        error_of(route, answer)
    answer = await fleet.request("/api/chat", raw(FORWARDED[3]), headers={"Content-Encoding": "Identity"})
    assert answer.status == 200


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
async def test_a_row_takes_its_methods_and_no_other(fleet: Fleet, route: Route):
    path = route.path.replace("{id:path}", LLAMA).replace("{path:path}", "base.css")
    for method in METHODS:
        body = raw(route) if route in FORWARDED else None
        answer = await fleet.request(path, body, method=method)
        if method in route.methods:
            assert answer.status != 405
            assert answer.status < 500
            continue
        if method == "BREW" and answer.status == 400:
            continue  # the parser knows the methods of HTTP
        assert answer.status == 405, (method, answer)
        assert answer.headers["allow"] == ", ".join(route.methods)
        if method != "HEAD":
            assert path.rpartition("/")[0] in answer.error or route.path in answer.error


@pytest.mark.parametrize(
    "route", [route for route in OWN if "GET" in route.methods], ids=lambda route: route.path
)
async def test_what_only_reads_does_not_look_at_a_body(fleet: Fleet, route: Route):
    path = route.path.replace("{id:path}", LLAMA).replace("{path:path}", "css/base.css")
    answer = await fleet.request(path, b"\xff" * 100, method="GET")
    assert answer.status in (200, 404)
    assert answer.whole


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/nothing", "openai"),
        ("/v1/chat/completions/", "openai"),
        ("/v1/messages", "openai"),
        ("/api/nothing", "ollama"),
        ("/api/pull", "ollama"),
        ("/api/tags/", "ollama"),
        ("/", "ollama"),
        ("/favicon.ico", "ollama"),
        ("//api/chat", "ollama"),
        ("/v1/../fleet/status", "openai"),
        ("/%2e%2e/etc/passwd", "ollama"),
        ("/dashboard/static/../../cli.py", "ollama"),
        ("/dashboard/static/%2e%2e/%2e%2e/base.html", "ollama"),
        ("/api/chat%00", "ollama"),
    ],
)
async def test_a_path_that_is_nowhere_is_404_in_a_shape_that_the_caller_knows(
    fleet: Fleet, path: str, dialect: str
):
    if path == "/":
        path = "/x" * 1000
    answer = await fleet.request(path, b"{}")
    expected = 405 if path.startswith("/dashboard/static") else 404
    assert answer.status == expected, answer
    assert isinstance(answer.json()["error"], dict if dialect == "openai" else str)
    assert len(answer.error) < 300


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=-1", "limit=1e3", "limit=99999999999", "limit=%D9%A3", "limit=%00"]
)
async def test_a_bad_query_is_400(fleet: Fleet, query: str):
    answer = await fleet.request(f"/dashboard/api/traces?{query}", method="GET")
    assert (answer.status, "'limit'" in answer.error) == (400, True)


async def test_queries_for_traces(fleet: Fleet):
    answer = await fleet.ask(QUESTIONS[0])
    await fleet.check(answer)
    request_id = answer.headers["x-request-id"]
    rows = (await fleet.get(f"/dashboard/api/traces?limit=3&request_id={request_id}"))["traces"]
    assert [(row["request_id"], row["client_ip"]) for row in rows] == [(request_id, "127.0.0.1")]
    assert len(rows[0]["scores_breakdown"]) == 7
    assert (await fleet.get("/dashboard/api/traces?request_id=nothing"))["traces"] == []
    assert len((await fleet.get("/dashboard/api/traces?limit=2"))["traces"]) <= 2


async def test_the_callers_own_id_and_tags_are_kept_beside_ours(fleet: Fleet):
    headers = {"X-Request-Id": "x" * 500, "X-Herd-Tags": "a, b,,c"}
    body = QUESTIONS[0].body | {"metadata": {"tags": ["z"]}, "user": "anna"}
    answer = await fleet.request(QUESTIONS[0].path, body, headers=headers)
    answer.asked_as = "x" * 128
    [row] = await fleet.check(answer)
    assert (row["client_request_id"], row["tags"], row["user"]) == ("x" * 128, ["z", "a", "b", "c"], "anna")
    assert answer.headers["x-request-id"] == row["request_id"] != row["client_request_id"]
