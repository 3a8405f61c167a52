"""docs/openapi.yaml as a value: what it says of each row of the route table, and whether an answer is so.

Only reads the page and knows no expectation of its own: what the tests assert is that the page and the router
say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import referencing
import referencing.jsonschema
import yaml

from herd_node.protocol.routes import Route

FILE = Path(__file__).parents[1] / "docs" / "openapi.yaml"
METHODS = ("get", "head", "post", "put", "delete", "patch", "options", "trace")
_URI = "urn:page"


@cache
def page() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def path_of(route: Route) -> str:
    """As the page writes it: OpenAPI has no parameters that hold slashes."""
    return route.path.replace(":path}", "}")


def operations() -> set[tuple[str, str]]:
    """(method, path) of everything that the page describes."""
    return {
        (method.upper(), path)
        for path, item in page()["paths"].items()
        for method in item
        if method in METHODS
    }


def operation(method: str, path: str) -> dict[str, Any]:
    return page()["paths"][path][method.lower()]


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` stands for."""
    while "$ref" in value:
        found: Any = page()
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


@cache
def _validator(pointer: str) -> jsonschema.Draft202012Validator:
    resource = referencing.jsonschema.DRAFT202012.create_resource(page())
    registry = referencing.Registry().with_resource(_URI, resource)
    return jsonschema.Draft202012Validator({"$ref": f"{_URI}#{pointer}"}, registry=registry)


def _pointer(*parts: str) -> str:
    return "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in parts)


# ---- requests


def json_body(route: Route) -> dict[str, Any] | None:
    """The media type object of a row's JSON body; None where it takes none."""
    method = next((method for method in route.methods if method in ("POST", "DELETE")), None)
    if method is None:
        return None
    return operation(method, path_of(route)).get("requestBody", {}).get("content", {}).get("application/json")


def examples(route: Route) -> list[dict[str, Any]]:
    """Bodies that the row takes, the least one first; each a copy."""
    media = json_body(route) or {}
    found = [media["example"]] if "example" in media else []
    found += [example["value"] for example in media.get("examples", {}).values()]
    return json.loads(json.dumps(found))


def takes(route: Route, body: object) -> bool:
    """Whether the page's schema takes a body."""
    method = "DELETE" if route.methods == ("DELETE",) else "POST"
    pointer = _pointer(
        "paths", path_of(route), method.lower(), "requestBody", "content", "application/json", "schema"
    )
    return _validator(pointer).is_valid(body)


def fields(route: Route) -> set[str]:
    """The top-level fields that the page names."""
    media = json_body(route)
    return set() if media is None else set(_properties(media["schema"]))


def _properties(schema: dict[str, Any]) -> Iterator[str]:
    schema = resolved(schema)
    yield from schema.get("properties", ())
    for part in schema.get("allOf", ()):
        yield from _properties(part)


def is_a(name: str, value: object) -> bool:
    """Whether a value is of one of the page's schemas."""
    return _validator(_pointer("components", "schemas", name)).is_valid(value)


# ---- answers


def complaints(method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> list[str]:
    """What about an answer is not as the page says; header names in lower case."""
    responses = operation(method, path)["responses"]
    key = next((key for key in (str(status), f"{status // 100}XX", "default") if key in responses), None)
    if key is None:
        return [f"status {status} is not on the page"]
    response = resolved(responses[key])
    found = list(_header_complaints(response.get("headers", {}), headers))
    if method == "HEAD":
        return found
    content = response.get("content")
    if content is None:
        return [*found, *(["a body where there is none on the page"] if body else [])]
    kind = headers.get("content-type", "").partition(";")[0]
    if not body and "x-fleet-node" in headers and key == "200":
        return found  # a managed call that has nothing to say
    if kind not in content:
        return [*found, f"content type {kind!r} is not one of {sorted(content)}"]
    where = _where(responses[key], method, path, key)
    validator = _validator(where + _pointer("content", kind, "schema"))
    try:
        value = json.loads(body) if kind == "application/json" else body.decode()
    except ValueError as error:
        return [*found, f"the body is no {kind}: {error}"]
    return [*found, *(f"{error.json_path}: {error.message[:300]}" for error in validator.iter_errors(value))]


def _where(response: dict[str, Any], method: str, path: str, key: str) -> str:
    if "$ref" in response:
        return str(response["$ref"]).removeprefix("#")
    return _pointer("paths", path, method.lower(), "responses", key)


def _header_complaints(wanted: dict[str, Any], headers: Mapping[str, str]) -> Iterator[str]:
    for name, header in wanted.items():
        about = resolved(header)
        text = headers.get(name.lower())
        if text is None:
            if about.get("required"):
                yield f"header {name} is missing"
            continue
        schema = about["schema"]
        value: object = int(text) if schema.get("type") == "integer" and text.isdigit() else text
        if not jsonschema.Draft202012Validator(schema).is_valid(value):
            yield f"header {name} is {text!r}"
