"""Whatever is wrong with a request, on whatever row of the table: 4xx at once, in the caller's dialect.

Driven by the route table and by docs/openapi.yaml: a new row is covered once it is on both, with an example.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import orjson
import pytest

from herd.web.routes import OWN, ROUTES
from herd_node.protocol.routes import FORWARDED as EVERY_FORWARDED
from herd_node.protocol.routes import Route
from tests import api_page
from tests.router.kit import LLAMA, OLLAMA, QUESTIONS, TEXT, Answer, Fleet, until
from tests.test_openapi import VALUES, changed

FORWARDED = [route for route in EVERY_FORWARDED if route.model_at == "body"]
FORMS = [route for route in EVERY_FORWARDED if route.model_at == "form"]
#: Those that manage models, and whose body is read here.
MANAGED = [route for route in ROUTES if route.kind == "manage" and api_page.json_body(route)]
READ = [*FORWARDED, *MANAGED]
#: Stands in every body and header here, and may be found nowhere afterwards.
SECRET = "Pikkarainen"
MAX_BODY_BYTES = 32 * 1024 * 1024


def named(route: Route) -> str:
    return route.path


def method_of(route: Route) -> str:
    return next(method for method in route.methods if method in ("POST", "DELETE"))


def good(route: Route, **changed: Any) -> dict[str, Any]:
    return api_page.examples(route)[0] | changed


def raw(route: Route, **changed: Any) -> bytes:
    return orjson.dumps(good(route, **changed))


async def send(fleet: Fleet, route: Route, body: object, **headers: str) -> Answer:
    """What comes back is as docs/openapi.yaml says, whatever was sent."""
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = await fleet.request(route.path, body, method=method_of(route), headers=shown)
    complaints = api_page.complaints(
        method_of(route), api_page.path_of(route), answer.status, answer.headers, answer.body
    )
    assert complaints == [], (body, answer)
    return answer


OWN_ERRORS = {"openai": "OpenAIError", "anthropic": "AnthropicError"}


def error_of(route: Route, answer: Answer) -> str:
    """The sentence of a refusal of the router's own. What its type and code are is seen in `send`."""
    assert answer.headers["x-fleet-attempts"] == "0"
    assert api_page.is_a(OWN_ERRORS.get(route.dialect, "OllamaError"), answer.json())
    assert "\n" not in answer.error
    return answer.error


def untouched(fleet: Fleet) -> None:
    """No backend has seen anything, nothing runs, nobody waits."""
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0
    idle(fleet)


def idle(fleet: Fleet) -> None:
    assert not fleet.router.dispatcher.live
    assert len(fleet.router.room) == 0
    assert fleet.live() == 0


async def works(fleet: Fleet) -> None:
    answer = await fleet.ask(QUESTIONS[0])
    assert answer.text == TEXT
    await fleet.check(answer)


async def forgotten(fleet: Fleet) -> None:
    """Neither a log nor the database of router or agents holds anything of what was sent."""
    await fleet.router.traces.flush()
    for file in fleet.folder.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def but(route: Route, field: bytes) -> bytes:
    """A good body with one more field."""
    return raw(route)[:-1] + b"," + field + b"}"


#: No JSON, or not what its reader could rely on: 400 wherever a body is read.
MALFORMED: dict[str, Callable[[Route], bytes]] = {
    "nothing": lambda route: b"",
    "white space": lambda route: b" \r\n\t ",
    "no json": lambda route: f"model=m&prompt={SECRET}".encode(),
    "half a json": lambda route: raw(route)[:-1],
    "text behind it": lambda route: raw(route) + SECRET.encode(),
    "two objects": lambda route: raw(route) * 2,
    "not utf-8": lambda route: but(route, b'"x":"\xff\xfe"'),
    "a surrogate in utf-8": lambda route: but(route, b'"x":"\xed\xa0\x80"'),
    "utf-16": lambda route: raw(route).decode().encode("utf-16"),
    "utf-32": lambda route: raw(route).decode().encode("utf-32"),
    "byte order mark": lambda route: b"\xef\xbb\xbf" + raw(route),
    "nul behind it": lambda route: raw(route) + b"\0",
    "nan": lambda route: but(route, b'"temperature":NaN'),
    "infinity": lambda route: but(route, b'"temperature":-Infinity'),
    "more than a double": lambda route: but(route, b'"seed":1e999'),
    "a number of 400 digits": lambda route: but(route, b'"seed":' + b"9" * 400),
    "lone surrogate": lambda route: but(route, b'"x":"\\ud800"'),
    "lone low surrogate": lambda route: but(route, b'"x":"\\udc00 ' + SECRET.encode() + b'"'),
    "surrogate in a key": lambda route: but(route, b'"\\udfff":1'),
    "control character": lambda route: but(route, b'"x":"\x01"'),
    "lists too deep": lambda route: but(route, b'"x":' + nested(100_000)),
    "objects too deep": lambda route: but(route, b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "never closed": lambda route: b"[" * 100_000,
    "a comment": lambda route: but(route, b'"x":1 /* ' + SECRET.encode() + b" */"),
    "a comma too many": lambda route: but(route, b'"x":1,'),
    "single quotes": lambda route: raw(route).replace(b'"', b"'"),
    "a list": lambda route: b"[" + raw(route) + b"]",
    "a string": lambda route: f'"{SECRET}"'.encode(),
    "a number": lambda route: b"7",
    "null": lambda route: b"null",
}
#: About `model`, wherever a body names one.
MODELS: dict[str, tuple[tuple[int, ...], Any]] = {
    "null": ((400, 404), None),
    "empty": ((400, 404), ""),
    "number": ((400,), 7),
    "boolean": ((400,), True),
    "list": ((400,), ["m"]),
    "object": ((400,), {"id": SECRET}),
    "with NUL": ((400,), "m\x00n"),
    "with a line end": ((400,), "m\r\nX-Evil: 1"),
    "with spaces": ((400,), "a model"),
    "invisible": ((400,), "m\u200bn"),
    "right to left": ((400,), "\u202em"),
    "as markup": ((400,), "<img src=x>"),
    "as path": ((400,), "../../etc/passwd"),
    "too long": ((400,), "m" * 10_000),
}
UNKNOWN = ("nowhere:1", "не/здесь:名", "nowhere:" + "9" * 180)
#: A second field that some backend would read for the first.
TWINS = (b'"MODEL":"x"', b'"model":"x"', b'"mod\\u0065l":"x"', b'"moDel":null')


@pytest.mark.parametrize("route", READ, ids=named)
async def test_a_malformed_body_is_400_at_once(fleet: Fleet, route: Route, caplog: pytest.LogCaptureFixture):
    loop = asyncio.get_running_loop()
    with caplog.at_level(logging.DEBUG):
        for name, make in MALFORMED.items():
            began_s = loop.time()
            answer = await send(fleet, route, make(route), X_Herd_Tags=SECRET, Cookie=SECRET)
            assert loop.time() - began_s < 2, name
            assert answer.status == 400, (name, answer)
            assert answer.headers["x-should-retry"] == "false"
            error_of(route, answer)
            untouched(fleet)
    assert SECRET not in caplog.text
    await forgotten(fleet)
    await works(fleet)


@pytest.mark.parametrize("route", READ, ids=named)
async def test_a_model_that_is_no_name_is_refused(fleet: Fleet, route: Route):
    if "model" not in good(route) or route.path == "/api/create":
        return  # a copy names a source; what is created, the node names
    for name, (statuses, value) in MODELS.items():
        answer = await send(fleet, route, raw(route, model=value))
        assert answer.status in statuses, (name, answer)
        error_of(route, answer)
        untouched(fleet)
    lone = raw(route).replace(b'"model":"', b'"model":"\\udfff')
    assert (await send(fleet, route, lone)).status == 400
    left_out = {key: value for key, value in good(route).items() if key != "model"}
    assert (await send(fleet, route, left_out)).status in (400, 404)
    await works(fleet)


@pytest.mark.parametrize("route", READ, ids=named)
async def test_two_models_are_refused(fleet: Fleet, route: Route):
    if "model" not in good(route):
        return
    for twin in TWINS:
        answer = await send(fleet, route, but(route, twin))
        assert answer.status == 400, (twin, answer)
        assert "more than one field 'model'" in error_of(route, answer)
        untouched(fleet)


@pytest.mark.parametrize("route", READ, ids=named)
async def test_a_field_of_the_wrong_type_is_refused(fleet: Fleet, route: Route):
    """Every field that the page gives a type, in the least body that there is."""
    refused, named_above = set(), {"model"} if route in FORWARDED else set()
    for field in sorted({*api_page.fields(route), *good(route)} - named_above):
        for value in VALUES:
            body = changed(good(route), (field,), value)
            if api_page.takes(route, body):
                continue
            answer = await send(fleet, route, body)
            assert answer.status == 400, (field, value, answer)
            error_of(route, answer)
            refused.add(field)
    assert refused >= {"fallback_models" if route in FORWARDED else "node_id"}
    untouched(fleet)
    await works(fleet)


@pytest.mark.parametrize("route", FORWARDED, ids=named)
async def test_what_may_be_deep_is_refused_or_answered(fleet: Fleet, route: Route):
    """Between what is written (254 levels) and what is read (1,024), in each field; a node translates."""
    for levels in (200, 300, 1000):
        for field in sorted(api_page.fields(route) - {"model"}):
            body = orjson.dumps(good(route, model=LLAMA) | {field: "DEEP"}).replace(b'"DEEP"', nested(levels))
            answer = await send(fleet, route, body)
            assert answer.status in (200, 400, 404, 501), (field, levels, answer)
    await until(lambda: fleet.live() == 0, "the backends to be idle")
    await works(fleet)


@pytest.mark.parametrize("route", FORWARDED, ids=named)
async def test_a_model_that_nobody_has_is_404(fleet: Fleet, route: Route):
    for name in UNKNOWN:
        answer = await send(fleet, route, raw(route, model=name))
        assert answer.status == 404
        assert name in error_of(route, answer)
    untouched(fleet)


@pytest.mark.parametrize("route", FORWARDED, ids=named)
async def test_a_prompt_that_fits_nowhere_is_refused_before_it_is_sent(fleet: Fleet, route: Route):
    """On a llama-server, whose context is fixed (2,048 tokens here)."""
    if route.kind not in ("chat", "completion", "generate", "responses"):
        return  # the others have no context that the router knows of
    key = "messages" if route.kind == "chat" else "input" if route.kind == "responses" else "prompt"
    text = SECRET + " x" * 20_000
    body = good(route, model=LLAMA) | {
        key: [{"role": "user", "content": text}] if key == "messages" else text
    }
    answer = await send(fleet, route, body)
    assert answer.status == 400
    assert "context" in error_of(route, answer)
    untouched(fleet)
    await forgotten(fleet)


@pytest.mark.parametrize("model", [OLLAMA, LLAMA])
@pytest.mark.parametrize("route", FORWARDED, ids=named)
async def test_what_a_backend_refuses_or_fails_at_is_not_kept_either(fleet: Fleet, route: Route, model: str):
    text = orjson.dumps(good(route, model=model)).replace(b'"hi"', f'"{SECRET}"'.encode())
    bad = text[:-1] + b',"top_k":"many","max_tokens":"many","options":{"num_predict":"many"}}'
    for fake in fleet.fakes(model):
        quoted = orjson.dumps({"error": f"cannot make sense of {SECRET}"}).decode()
        fake.fault("status", status=400, count=1, body=quoted)
        fake.fault("status", status=500, count=None)
    for body in (text, bad, text, text):
        answer = await send(fleet, route, body)
        assert answer.status in (200, 400, 404, 501, 502), answer
    await until(lambda: fleet.live() == 0, "the backends to be idle")
    await forgotten(fleet)


WITH_BODIES = [route for route in ROUTES if {"POST", "DELETE"} & set(route.methods)]


@pytest.mark.parametrize("route", [one for one in WITH_BODIES if one.body == "whole"], ids=named)
async def test_a_body_that_says_it_is_too_large_is_413_unread(fleet: Fleet, route: Route):
    body_bytes = 33 * 1024 * 1024
    headers = {"Content-Length": str(body_bytes), "X-Herd-Auth": "x"}
    answer = await fleet.request(route.path, None, method=method_of(route), headers=headers)
    if route.path == "/heartbeat":
        assert answer.status == 400  # the signature stands before the body
        return
    assert answer.status == 413
    assert answer.headers["connection"] == "close"
    assert str(MAX_BODY_BYTES) in answer.error
    path = api_page.path_of(route)
    assert api_page.complaints(method_of(route), path, 413, answer.headers, answer.body) == []
    untouched(fleet)


#: A form, and what is not one.
def form(*parts: str, end: str = "--B--\r\n") -> bytes:
    return (
        "".join(f"--B\r\nContent-Disposition: form-data; {part}\r\n" for part in parts).encode()
        + end.encode()
    )


MODEL, SOUND = f'name="model"\r\n\r\n{OLLAMA}', f'name="file"; filename="{SECRET}.wav"\r\n\r\nRIFF'
BAD_FORMS: dict[str, bytes] = {
    "nothing": b"",
    "json": b'{"model":"m"}',
    "no boundary in it": b"x" * 5000,
    "no end": form(MODEL, SOUND, end=""),
    "cut off": form(MODEL, SOUND)[:-20],
    "no model": form(SOUND),
    "an empty model": form('name="model"\r\n\r\n', SOUND),
    "a model that is a file": form('name="model"; filename="m"\r\n\r\nm', SOUND),
    "two models": form(MODEL, MODEL, SOUND),
    "a model of markup": form('name="model"\r\n\r\n<m>', SOUND),
    "a model that is too long": form('name="model"\r\n\r\n' + "m" * 70_000, SOUND),
    "no file": form(MODEL),
    "a file that is a field": form(MODEL, 'name="file"\r\n\r\nRIFF'),
    "too many parts": form(MODEL, SOUND, *(f'name="f{n}"\r\n\r\n{n}' for n in range(70))),
    "a part without a name": form(MODEL, SOUND, "x=y\r\n\r\n1"),
    "a field that is not utf-8": form(MODEL, SOUND, 'name="x"\r\n\r\nQ').replace(b"Q", b"\xff"),
}


@pytest.mark.parametrize("route", FORMS, ids=named)
async def test_a_bad_form_is_refused_in_the_dialect_of_the_row(fleet: Fleet, route: Route):
    for name, body in BAD_FORMS.items():
        answer = await send(fleet, route, body, Content_Type="multipart/form-data; boundary=B")
        assert answer.status == 400, (name, answer)
        error_of(route, answer)
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=", "", "\xff"):
        answer = await send(fleet, route, form(MODEL, SOUND), Content_Type=kind)
        assert answer.status == 400, (kind, answer)
    for model in UNKNOWN:
        body = form(f'name="model"\r\n\r\n{model}', SOUND)
        answer = await send(fleet, route, body, Content_Type="multipart/form-data; boundary=B")
        assert answer.status == 404
    untouched(fleet)
    await forgotten(fleet)


@pytest.mark.parametrize("route", READ, ids=named)
async def test_no_header_can_break_a_row(fleet: Fleet, route: Route):
    """Latin-1, UTF-8 and worse; a refusal or an answer, never a 500."""
    values = ("\xff\xfe", "не".encode().decode("latin-1"), "a" * 8000, '\t,,;="', "0", "-1")
    for name in (
        "X-Herd-Tags",
        "X-Request-Id",
        "X-Fleet-Node",
        "Content-Type",
        "Accept",
        "anthropic-version",
    ):
        for value in values:
            answer = await send(fleet, route, b"{}", **{name.replace("-", "_"): value})
            assert answer.status in (400, 404), (name, value, answer)
    untouched(fleet)
    await works(fleet)


@pytest.mark.parametrize("name", ["не/здесь:名", "\udcff", "a b", "%00", "x" * 5000, "..", "a?b#c"])
async def test_names_in_paths_and_queries_are_read_whatever_they_are(fleet: Fleet, name: str):
    shown = quote(name, errors="surrogateescape")
    for path in (f"/v1/models/{shown}", f"/dashboard/static/{shown}", f"/api/blobs/{shown}"):
        row = "/v1/models/{id}" if "models" in path else "/dashboard/static/{path}"
        if "blobs" in path:
            answer = await fleet.request(path, b"x")
            row, method = "/api/blobs/{digest}", "POST"
        else:
            answer, method = await fleet.request(path, method="GET"), "GET"
        assert answer.status in (400, 404), (path, answer)
        if answer.status != 404 or "blobs" not in path:  # a digest with a slash is another path
            assert api_page.complaints(method, row, answer.status, answer.headers, answer.body) == []
    body = orjson.dumps({"model": OLLAMA})
    for path in (f"/api/push?node={shown}", f"/api/push?{shown}={shown}"):
        answer = await fleet.request(path, body)
        assert answer.status in (200, 400, 404), (path, answer)
    idle(fleet)


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


@pytest.mark.parametrize("encoding", ["gzip", "zstd", "br", "deflate, gzip", "\xff"])
async def test_a_body_that_cannot_be_unpacked_is_refused(fleet: Fleet, encoding: str):
    for route in (*FORWARDED, *FORMS):
        answer = await send(
            fleet, route, raw(route) if route in FORWARDED else b"x", Content_Encoding=encoding
        )
        packed = encoding in ("gzip", "zstd") and route.path.startswith("/v1/") and route in FORWARDED
        assert answer.status == (400 if packed else 415), (route.path, answer)
        error_of(route, answer)
    untouched(fleet)
    answer = await fleet.request("/api/chat", raw(FORWARDED[3]), headers={"Content-Encoding": "Identity"})
    assert answer.status == 200


METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
async def test_a_row_takes_its_methods_and_no_other(fleet: Fleet, route: Route):
    path = route.path.replace("{id:path}", LLAMA).replace("{path:path}", "base.css")
    path = path.replace("{digest}", "sha256:" + "0" * 64)
    for method in METHODS:
        body = raw(route) if route in FORWARDED else None
        answer = await fleet.request(path, body, method=method)
        if method in route.methods:
            assert answer.status != 405
            assert answer.status < 500 or answer.json()["error"]["code"] == "not_offered"
            complaints = api_page.complaints(
                method, api_page.path_of(route), answer.status, answer.headers, answer.body
            )
            assert complaints == [], answer
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
        ("/v1/messagesx", "openai"),
        ("/v1/messages/", "anthropic"),
        ("/v1/messages/batches", "anthropic"),
        ("/api/nothing", "ollama"),
        ("/api/pull/", "ollama"),
        ("/api/blobs/sha256:00/x", "ollama"),
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
    assert isinstance(answer.json()["error"], str if dialect == "ollama" else dict)
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
