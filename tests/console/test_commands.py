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
from herd.trace import SIGNALS, ScoreCard
from herd_node.protocol.auth import parse_token
from herd_node.runtime.paths import DataDir
from tests.samples import WALL_S, as_row, fleet_status, trace, write_batch

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


def test_status_names_totals_nodes_queues_and_troubles(
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
    assert out[-2:] == [
        "laptop: Nothing was heard from it for 3 min.",
        "pi: Backend not ready: nothing answers on 11434.",
    ]


def test_nodes_show_the_state_of_each_machine(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.run_nodes(args) == 0
    gpu = "RTX 3090 20/24 GiB"
    assert [cells(line) for line in lines(capsys)[1:3]] == [
        [
            "den",
            "online",
            "1/2",
            "23%",
            "14/32 GiB",
            "normal",
            "nominal 54 °C",
            "1 s ago",
            "ollama 0.11.4",
            "–",
        ],
        [
            "attic",
            "online",
            "0/1",
            "88%",
            "15/16 GiB",
            "warn",
            "serious 91 °C",
            "1 s ago",
            "ollama 0.11.4",
            gpu,
        ],
    ]


def test_models_are_merged_and_those_of_nodes_that_are_gone_left_out(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.run_models(args) == 0
    assert [cells(line) for line in lines(capsys)[1:]] == [
        ["llama3.2:3b", "hot", "2.0 GB", "4096", "1/2", "0", "den (hot), attic (warm)"],
        ["nomic-embed-text", "cold", "274 MB", "–", "–", "0", "attic"],
        ["qwen3:8b", "loading", "5.2 GB", "–", "0/1", "2", "attic (loading), den"],
    ]


def test_ps_shows_what_is_loaded_and_where(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert views.run_ps(args) == 0
    assert [cells(line) for line in lines(capsys)[1:]] == [
        ["llama3.2:3b", "den", "hot", "2.0 GB", "4096", "1/2"],
        ["qwen3:8b", "attic", "loading", "5.2 GB", "–", "0/1"],
    ]


def test_json_is_the_contract_and_nothing_else(
    args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    args.json = True

    def answer(command: Command) -> Any:
        assert command(args) == 0
        return json.loads(capsys.readouterr().out)

    status = fleet_status()
    assert answer(views.run_status) == status
    assert answer(views.run_nodes) == {"nodes": status["nodes"]}
    models = answer(views.run_models)["models"]
    assert models[0] == {"node_id": "den", **status["nodes"][0]["models"][0]}
    assert len(models) == 5
    assert [(m["node_id"], m["name"]) for m in answer(views.run_ps)["models"]] == [
        ("den", "llama3.2:3b"),
        ("attic", "qwen3:8b"),
    ]


def test_an_empty_fleet_is_said_in_words(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {**fleet_status(), "nodes": [], "queues": {}}
    router.answers["/fleet/status"] = (200, json.dumps(status).encode())
    assert [command(args) for command in VIEWS] == [0, 0, 0, 0]
    out = capsys.readouterr().out
    assert "No node has joined yet" in out
    assert "No model is loaded anywhere." in out


@pytest.mark.parametrize("command", VIEWS)
def test_without_a_router_one_sentence_goes_to_standard_error(
    command: Command, down: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(down) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"No router answers at http://127.0.0.1:{down.port} (")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b"[]"), (200, b'{"nodes": []}'), (404, b"not found")]
)
def test_what_is_not_a_router_is_called_so(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str], status: int, body: bytes
) -> None:
    router.answers["/fleet/status"] = (status, body)
    assert views.run_status(args) == 1
    assert "is not a herd router" in capsys.readouterr().err


def test_the_routers_own_refusal_is_passed_on(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = {"error": {"message": "not from there; --allow-net lets you in"}}
    router.answers["/fleet/status"] = (403, json.dumps(refusal).encode())
    assert views.run_status(args) == 1
    assert "answered 403: not from there; --allow-net lets you in." in capsys.readouterr().err


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "*", None, "127.0.0.1", "localhost"])
def test_a_router_that_listens_everywhere_is_asked_on_loopback(
    args: argparse.Namespace, host: str | None
) -> None:
    args.host = host
    assert views.run_status(args) == 0


def test_names_from_elsewhere_cannot_touch_the_terminal(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    status = fleet_status()
    status["nodes"][2]["reason"] = "\x1b[2Jgone\u202e"
    status["nodes"][0]["models"][0]["name"] = "a\x07b\nc"
    router.answers["/fleet/status"] = (200, json.dumps(status).encode())
    for command in VIEWS:
        command(args)
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\u202e"}
    assert "?[2Jgone?" in out
    assert "a?b?c" in out


def test_traces_are_listed_with_their_numbers(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    router.traces = [as_row(trace(timestamp=WALL_S + i, fallback_used=i == 2)) for i in (3, 2, 1)]
    args.limit = 2
    assert traces.run_traces(args) == 0
    head, first, second = lines(capsys)
    assert " ".join(cells(head)[1:]) == "REQUEST TRY MODEL NODE STATUS SCORE QUEUE FIRST TOTAL TOK/S"
    numbers = ["completed", "106.5", "3 ms", "250 ms", "2.0 s", "40.0"]
    assert cells(first)[1:] == ["a" * 24, "1", "llama3.2:3b", "den", *numbers]
    assert "llama3.2:3b (for llama3.2:3b)" in second


def test_explain_last_shows_seven_signals_and_who_was_left_out(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = trace(attempt=1, node_id="attic", status="retried", error_message="attic closed the connection")
    router.traces = [as_row(trace(attempt=2)), as_row(failed), as_row(trace("b" * 24))]
    assert traces.run_explain(args) == 0
    out = lines(capsys)
    assert cells(out[0])[0] == f"request {'a' * 24}"
    first = out.index("attempt 1 on attic: retried")
    second = out.index("attempt 2 on den: completed")
    assert "  attic closed the connection" in out[first:second]
    table = [cells(line) for line in out[second:]]
    at = table.index(["node", *SIGNALS, "total"])
    assert table[at + 1] == ["*den", "50.0", "20.0", "0.0", "-3.5", "15.0", "10.0", "15.0", "106.5"]
    assert table[at + 2] == ["attic", "20.0", "20.0", "-1.0", "-2.0", "7.0", "10.0", "15.0", "69.0"]
    assert table[-1] == ["laptop", "offline", "the node is offline"]
    assert not any("b" * 24 in line for line in out)


def test_explain_says_when_a_node_lost_points_for_being_late(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    late = ScoreCard("den", 100.0, (50.0, 20.0, 0.0, 0.0, 15.0, 10.0, 15.0))
    router.traces = [as_row(trace(candidates=(late,), card=late))]
    assert traces.run_explain(args) == 0
    assert "den was degraded (late with its heartbeats): 10 points off." in capsys.readouterr().out


def test_a_request_that_was_sent_nowhere_can_be_explained_too(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = {"node_id": None, "score": None, "card": None, "candidates": (), "excluded": ()}
    router.traces = [as_row(trace(status="rejected", error_message="model 'x' not found", **nothing))]
    assert traces.run_explain(args) == 0
    out = lines(capsys)
    assert "attempt 1: rejected" in out
    assert "  model 'x' not found" in out


def test_explain_of_an_unknown_request_fails(
    router: Router, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    args.request_id = "f" * 24
    assert traces.run_explain(args) == 1
    assert "f" * 24 in capsys.readouterr().err
    args.request_id = "last"
    assert traces.run_explain(args) == 1
    assert capsys.readouterr().err == "No request has been made yet.\n"


def test_explain_and_traces_read_the_database_when_the_router_is_down(
    down: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fill() -> None:
        db = Database.open(DataDir(down.data_dir).database_file, WALL_S)
        rows = [trace(), trace("b" * 24, timestamp=WALL_S)]
        await db.write(lambda conn: write_batch(conn, rows))
        await db.close()

    asyncio.run(fill())
    down.request_id, down.limit, down.json = "last", 20, True
    assert traces.run_explain(down) == 0
    captured = capsys.readouterr()
    assert [row["request_id"] for row in json.loads(captured.out)["traces"]] == ["b" * 24]
    assert captured.err.startswith("No router answers at ")
    assert "latency.db" in captured.err
    assert traces.run_traces(down) == 0
    assert [row["request_id"] for row in json.loads(capsys.readouterr().out)["traces"]] == [
        "b" * 24,
        "a" * 24,
    ]


def test_without_router_and_database_traces_fail(
    down: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    down.limit = 20
    assert traces.run_traces(down) == 1
    assert "No router answers" in capsys.readouterr().err
    DataDir(down.data_dir).database_file.write_bytes(b"rubbish " * 1000)
    assert traces.run_traces(down) == 1
    assert "damaged" in capsys.readouterr().err


def test_join_gives_a_command_without_the_token_and_a_token_that_works(
    down: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    down.json = True
    assert join.run_join(down) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"token", "command", "router_url"}
    assert answer["command"] == "herd-node --join -"
    token = parse_token(answer["token"])
    assert token.urls[0] == answer["router_url"]
    assert token.secret == DataDir(down.data_dir).join_file.read_bytes()
    assert all(url.endswith(f":{down.port}") for url in token.urls)

    assert join.run_join(down) == 0
    assert json.loads(capsys.readouterr().out) == answer


def test_join_for_people_keeps_the_token_out_of_every_command(
    down: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert join.run_join(down) == 0
    with_token = [line for line in lines(capsys) if "herd1_" in line]
    assert len(with_token) == 1
    parse_token(with_token[0])
    assert " " not in with_token[0]


def test_join_says_when_only_this_machine_can_reach_the_router(
    down: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    down.host = "127.0.0.1"
    assert join.run_join(down) == 0
    assert "this machine alone" in capsys.readouterr().err


def test_join_in_a_folder_that_cannot_be_used_fails_in_one_sentence(
    down: argparse.Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    down.data_dir = tmp_path / "file" / "folder"
    assert join.run_join(down) == 1
    assert capsys.readouterr().err.count("\n") == 1


WIDE = [tables.Column("name", flexible=True), tables.Column("wait_time", right=True)]


def test_a_table_as_wide_as_it_takes_is_aligned() -> None:
    assert tables.table(WIDE, [("den", "1.0"), ("日本", "10.0")], None) == [
        "name  wait_time",
        "den         1.0",
        "日本       10.0",
    ]


@pytest.mark.parametrize("width", [20, 25, 40])
def test_a_table_fits_the_terminal(width: int) -> None:
    rows = [("a-very-long-name-of-a-node", "1.0"), ("日本語の名前日本語の名前", "10.0")]
    made = tables.table(WIDE, rows, width)
    assert max(tables.columns_of(line) for line in made) <= width
    assert len({tables.columns_of(line) for line in made[-2:]}) == 1


def test_spare_columns_go_before_names_become_unreadable() -> None:
    columns = [*WIDE, tables.Column("spare", spare=True)]
    assert tables.table(columns, [("a-very-long-name", "1.0", "something")], 18) == [
        "             wait_",
        "name          time",
        "a-very-long…   1.0",
    ]
    assert tables.table(columns, [("a", "1.0", "x")], 40)[0] == "name  wait_time  spare"
