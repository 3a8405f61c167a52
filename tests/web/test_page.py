"""The page: what it shows, that nothing of it is trusted, and that no markup stands in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import herd
from herd.store.reports import Latency
from herd.web import human, render
from tests.samples import WALL_S, as_row, fleet_status, node, started, trace

EVIL = """<script>alert(1)</script>"'&"""
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and attributes; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page(
    status: dict[str, Any] | None = None, traces: list[dict[str, Any]] | None = None, **more: Any
) -> Page:
    rows = [as_row(trace()), as_row(started("b" * 24))] if traces is None else traces
    context = render.overview_context(
        fleet_status() if status is None else status, rows, base_url="http://10.0.0.5:11435/", **more
    )
    return Page(render.render("overview.html", context).decode())


def test_the_page_shows_nodes_models_traces_totals_and_addresses() -> None:
    text = page().text
    assert "3 of 4 nodes online, 2 models loaded, 1 request active, 2 waiting" in text
    assert "den online In flight 1 of 2 slots CPU 23% Memory 14/32 GiB" in text
    assert "Pressure warn Heat serious 91 °C GPU RTX 3090 20/24 GiB" in text
    assert "qwen3:8b loading 5.2 GB – 0/1 2 attic loading den" in text
    assert "12 s ago llama3.2:3b den completed 106.5 3 ms 250 ms 2.0 s 40.0" in text
    assert "12 s ago llama3.2:3b den started 106.5 3 ms – – –" in text
    assert "OpenAI base URL http://10.0.0.5:11435/v1" in text
    assert "Ollama host http://10.0.0.5:11435 " in text


def test_a_node_that_is_gone_is_greyed_with_its_reason() -> None:
    made = page()
    gone = [attrs for tag, attrs in made.tags if tag == "li" and "gone" in (attrs["class"] or "")]
    assert len(gone) == 1
    assert "laptop offline Nothing was heard from it for 3 min." in made.text


def test_what_is_not_known_is_a_dash_and_never_a_number() -> None:
    assert (
        "pi online In flight 0 of 0 slots CPU – Memory – Pressure – Heat – Backends not ready" in page().text
    )


def test_an_empty_fleet_says_how_a_node_joins() -> None:
    status = {**fleet_status(), "nodes": []}
    text = page(status, [], join_command="/opt/my venv/bin/herd join").text
    assert "Run /opt/my venv/bin/herd join on the router's machine" in text
    assert "No request has been made yet." in text


def test_trouble_and_latencies_are_shown_when_there_are_any() -> None:
    text = page(
        notice="The disk is full.", latencies=[Latency("den", "m", 9, 1500.0, 2000.0, 9000.0, None, 80.0)]
    ).text
    assert "The disk is full." in text
    assert "den m 9 – 80 ms 1.5 s 2.0 s 9.0 s" in text


def test_names_from_elsewhere_are_shown_as_text() -> None:
    status = fleet_status()
    status["nodes"][0] = node(EVIL, "offline", reason=EVIL, agent_version=EVIL)
    status["nodes"][1]["models"][0]["name"] = EVIL
    status["nodes"][1]["backends"][0]["kind"] = EVIL
    status["nodes"][1]["heat"]["state"] = EVIL
    status["nodes"][1]["memory"]["pressure"] = EVIL
    row = as_row(trace(model=EVIL, node_id=EVIL, error_message=EVIL, original_model=EVIL, fallback_used=True))
    made = page(
        status, [row], notice=EVIL, join_command=EVIL, latencies=[Latency(EVIL, EVIL, 1, 1, 1, 1, 1, 1)]
    )
    assert "script" not in {tag for tag, _ in made.tags}
    assert made.text.count("<script>alert(1)</script>") >= 12
    assert any(attrs.get("title") == EVIL for _, attrs in made.tags)


def test_a_lone_surrogate_does_not_break_the_page() -> None:
    assert "?" in page(None, [as_row(trace(node_id="\ud800"))]).text


@pytest.mark.parametrize(
    "html",
    [
        render.render(
            "overview.html", render.overview_context(fleet_status(), [], base_url="http://x")
        ).decode(),
        render.render(
            "error.html", render.error_context(404, "Not found", "There is no such page.")
        ).decode(),
    ],
)
def test_pages_obey_their_own_security_policy(html: str) -> None:
    """`default-src 'self'` blocks inline scripts and styles, and everything from other places."""
    for tag, attrs in Page(html).tags:
        assert tag not in {"script", "style", "iframe", "object", "base"}
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        for name in ("href", "src", "action"):
            assert (attrs.get(name) or "/").startswith("/")


def test_the_security_headers_are_those_of_the_security_page() -> None:
    assert dict(render.SECURITY_HEADERS) == {
        b"content-security-policy": b"default-src 'self'",
        b"x-content-type-options": b"nosniff",
        b"x-frame-options": b"DENY",
        b"referrer-policy": b"no-referrer",
    }


def test_the_style_sheet_of_the_page_is_served() -> None:
    (link,) = [attrs for tag, attrs in page().tags if tag == "link"]
    found = render.static_file(str(link["href"]))
    assert found is not None
    body, content_type = found
    assert content_type.startswith(b"text/css")
    assert b"prefers-color-scheme: dark" in body


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/static/",
        "/dashboard/static/css",
        "/dashboard/static/css/../css/herd.css",
        "/dashboard/static/../base.html",
        "/dashboard/static//etc/passwd",
        "css/herd.css",
        "/dashboard/static/css/herd.css/",
    ],
)
def test_nothing_else_is_read_from_the_disk(path: str) -> None:
    assert render.static_file(path) is None


def strings(path: Path) -> Iterator[str]:
    for found in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(found, ast.Constant) and isinstance(found.value, str | bytes):
            yield found.value if isinstance(found.value, str) else found.value.decode("latin-1")


@pytest.mark.slow
def test_no_markup_stands_in_python() -> None:
    markup = re.compile(r"<(div|script|style|table|html|body|span|p|td|tr|li|ul|a)[\s>]", re.IGNORECASE)
    package = Path(herd.__file__).parent
    found = [
        (path.name, text) for path in package.rglob("*.py") for text in strings(path) if markup.search(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (human.size(None), "–"),
        (human.size(0), "–"),
        (human.size(999), "999 B"),
        (human.size(999_999), "1.0 MB"),
        (human.size(4_683_087_332), "4.7 GB"),
        (human.size(42_500_000_000), "42 GB"),
        (human.size(5 * 10**15), "5000 TB"),
        (human.memory_share(0, 17_179_869_184), "0 B/16 GiB"),
        (human.memory_share(None, 17_179_869_184), "–/16 GiB"),
        (human.memory_share(1, None), "–"),
        (human.duration_ms(0.4), "0 ms"),
        (human.duration_ms(999.4), "999 ms"),
        (human.duration_ms(999.6), "1.0 s"),
        (human.duration(9.94), "9.9 s"),
        (human.duration(59.7), "1 min"),
        (human.duration(185), "3 min 5 s"),
        (human.duration(7_440), "2 h 4 min"),
        (human.duration(200_000), "2 d"),
        (human.ago(-5), "0 s ago"),
        (human.ago(9.96), "10 s ago"),
        (human.count(1, "query", "queries"), "1 query"),
        (human.count(0, "node"), "0 nodes"),
        (human.busy(0, 0), "–"),
        (human.busy(1, 0), "1/0"),
        (human.number(WALL_S, 0), "1790000000"),
    ],
)
def test_numbers_read_well(made: str, text: str) -> None:
    assert made == text
