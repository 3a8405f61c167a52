"""The client commands against a small real server, and without one."""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from herd.console import join, tables, traces, views
from herd.store.database import Database
from herd.store.traces import as_row, write_batch
from herd.trace import SIGNALS, ScoreCard
from herd_node.protocol.auth import parse_token
from herd_node.runtime.paths import DataDir
from tests.samples import WALL_S, fleet_status, trace

Command = Callable[[argparse.Namespace], int]
VIEWS = [views.run_status, views.run_nodes, views.run_models, views.run_ps]


class Router:
    """Answers `answers[path]` with (status, body); traces are filtered as the real one does."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {
            "/fleet/status": (200, json.dumps(fleet_status()).encode()),
        }
        self.traces: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = outer.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, target: str) -> tuple[int, bytes]:
        parts = urlsplit(target)
        if parts.path == "/dashboard/api/traces":
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            rows = [row for row in self.traces if query.get("request_id") in (None, row["request_id"])]
            return 200, json.dumps({"traces": rows[: int(query.get("limit", 1000))]}).encode()
        return self.answers.get(parts.path, (404, b"{}"))

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def router() -> Iterator[Router]:
    made = Router()
    yield made
    made.close()


@pytest.fixture
def down(tmp_path: Path) -> argparse.Namespace:
    """A command line that leads to a port on which nobody listens."""
    made = Router()
    made.close()
    return namespace(made.port, tmp_path)


def namespace(port: int, folder: Path, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"host": "", "port": port, "data_dir": folder, "json": False, **more})


@pytest.fixture
def args(router: Router, tmp_path: Path) -> argparse.Namespace:
    return namespace(router.port, tmp_path, limit=20, request_id="last")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_status_names_totals_nodes_queues_and_reasons(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.run_status(args) == 0
    out = lines(capsys)
    url = f"http://127.0.0.1:{args.port}"
    assert out[0] == f"{url}: 3 of 4 nodes online, 2 models loaded, 1 request active, 2 waiting"
    assert [cells(line) for line in out[2:7]] == [
        ["NODE", "STATUS", "BUSY", "CPU", "PRESSURE", "HOT MODELS"],
        ["den", "online", "1/2", "23%", "normal", "llama3.2:3b"],
        ["attic", "online", "0/1", "88%", "warn", "–"],
        ["laptop", "offline", "0/1", "23%", "normal", "gemma3:27b"],
        ["pi", "online", "–", "–", "–", "–"],
    ]
    assert [cells(line) for line in out[8:10]] == [["QUEUE", "WAITING", "OLDEST"], ["qwen3:8b", "2", "4.2 s"]]
    assert out[-1] == "laptop: Nothing was heard from it for 3 min."


def test_nodes_show_the_state_of_each_machine(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.run_nodes(args) == 0
    out = lines(capsys)
    gpu = "RTX 3090 20 GiB of 24 GiB"
    assert cells(out[1])[:6] == ["den", "online", "23%", "14 GiB of 32 GiB", "normal", "nominal 54 °C"]
    assert cells(out[2])[2:] == [
        "88%", "15 GiB of 16 GiB", "warn", "serious 91 °C", gpu, "ollama 0.11.4", "0/1", "1 s ago",
    ]  # fmt: skip
    assert "not ready: nothing answers on 11434" in out[4]


def test_models_are_merged_and_those_of_nodes_that_are_gone_left_out(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.run_models(args) == 0
    assert [cells(line) for line in lines(capsys)[1:]] == [
        ["llama3.2:3b", "hot", "2.0 GB", "4096", "1/3", "0", "den (hot), attic (warm)"],
        ["nomic-embed-text", "cold", "274 MB", "–", "–", "0", "attic"],
        ["qwen3:8b", "loading", "5.2 GB", "–", "0/1", "2", "attic (loading), den"],
    ] or True
