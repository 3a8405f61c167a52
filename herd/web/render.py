"""Pages: a template, a frozen context, bytes. Autoescape is on and nothing is trusted: names come from other
machines.

Markup stands in `dashboard_templates/` alone. The built wheel carries that folder inside this package; in an
editable install there is no such copy, and the repository's folder is used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import herd
from herd.store.reports import Latency
from herd.web import human, overview

#: Sent with every page and static file. No script runs, from anywhere, and nobody frames us.
SECURITY_HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"content-security-policy", b"default-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
HTML: Final = b"text/html; charset=utf-8"
REFRESH_S: Final = 5
_STATIC_PREFIX: Final = "/dashboard/static/"
#: Nothing else is ever read from the disk for a URL.
_STATIC_FILES: Final[Mapping[str, bytes]] = {"css/herd.css": b"text/css; charset=utf-8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OverviewContext:
    """What `overview.html` may use."""

    version: str
    totals: str
    updated: str
    """ISO 8601, UTC: when the numbers were true."""
    refresh_s: int
    notice: str | None
    """One sentence about trouble of the router itself (the database, say)."""
    openai_url: str
    ollama_url: str
    status_url: str
    join_command: str
    nodes: tuple[overview.NodeSummary, ...]
    models: tuple[overview.ModelSummary, ...]
    traces: tuple[overview.TraceSummary, ...]
    latencies: tuple[Latency, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorContext:
    """What `error.html` may use."""

    version: str
    status: int
    title: str
    message: str


def overview_context(
    status: Mapping[str, Any],
    traces: Sequence[Mapping[str, Any]],
    *,
    base_url: str,
    join_command: str = "herd join",
    notice: str | None = None,
    latencies: Sequence[Latency] = (),
) -> OverviewContext:
    """From /fleet/status, the newest trace rows, and the address that clients are to use.

    `join_command` is spelled as it can be run on the router's machine.
    """
    base_url = base_url.rstrip("/")
    return OverviewContext(
        version=herd.__version__,
        totals=overview.totals(status),
        updated=overview.utc(status["timestamp"]),
        refresh_s=REFRESH_S,
        notice=notice,
        openai_url=f"{base_url}/v1",
        ollama_url=base_url,
        join_command=join_command,
        status_url=f"{base_url}/fleet/status",
        nodes=overview.nodes(status),
        models=overview.models(status),
        traces=overview.traces(traces, status["timestamp"]),
        latencies=tuple(latencies),
    )


def error_context(status: int, title: str, message: str) -> ErrorContext:
    return ErrorContext(version=herd.__version__, status=status, title=title, message=message)


def render(name: str, context: OverviewContext | ErrorContext) -> bytes:
    """The page `name` (`overview.html`, `error.html`) in UTF-8."""
    values = {field.name: getattr(context, field.name) for field in fields(context)}
    # A lone surrogate cannot be sent; anything else of any script can.
    return _environment().get_template(name).render(values).encode("utf-8", "replace")


def static_file(path: str) -> tuple[bytes, bytes] | None:
    """Body and content type of a URL path under /dashboard/static/; None for all but the listed files."""
    name = path.removeprefix(_STATIC_PREFIX)
    if name == path or name not in _STATIC_FILES:
        return None
    return templates_folder().joinpath("static", *name.split("/")).read_bytes(), _STATIC_FILES[name]


def templates_folder() -> Path:
    """1. Inside the installed package. 2. Editable install: the repository's, beside the package."""
    package = Path(str(resources.files("herd.web")))
    inside = package / "dashboard_templates"
    return inside if inside.is_dir() else package.parents[1] / "dashboard_templates"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(templates_folder()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {"duration_ms": human.duration_ms, "percent": human.percent}
    return environment
