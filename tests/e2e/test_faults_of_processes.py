"""Plugs pulled: agents and routers killed and stopped while real models answer."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.kit import Fleet, Program, free_port, until

pytestmark = [pytest.mark.e2e, pytest.mark.llama, pytest.mark.slow]

#: Some seconds of prefill on one thread, so that the answer has not begun when the plug is pulled.
LONG = [{"role": "user", "content": "List the words in this text. " + "apple river stone cloud " * 120}]

_GENERATE = {"model": MODEL, "prompt": "One", "stream": False, "options": {"num_predict": 4}}


@pytest.fixture
def fleet(tmp_path: Path, small_model_path: Path):
    fleet = Fleet(tmp_path)
    try:
        for node_id in ("a", "b"):
            fleet.start_agent(node_id, "--embedded", "--model", str(small_model_path))
        fleet.until_online("a", "b", model=MODEL)
        yield fleet
    finally:
        fleet.close()


def _serving(fleet: Fleet) -> str | None:
    nodes = fleet.get("/fleet/status")["nodes"]
    return next((node["node_id"] for node in nodes if node["in_flight"]), None)


def test_callers_do_not_notice_that_the_serving_agent_is_killed_before_their_answer(fleet: Fleet) -> None:
    body = {"model": MODEL, "messages": LONG, "max_tokens": 4}
    with ThreadPoolExecutor(2) as callers:
        answers = [callers.submit(fleet.post, "/v1/chat/completions", body) for _ in range(2)]
        victim = until(lambda: _serving(fleet), "a node to serve")
        children = psutil.Process(fleet.agents[victim].pid).children(recursive=True)
        assert children, "the agent's llama.cpp server is its child"
        fleet.agents[victim].kill()
        _, alive = psutil.wait_procs(children, timeout=2)
        assert not alive, "the llama.cpp server outlived its agent by 2 s"
        for answer in answers:
            status, headers, content = answer.result(timeout=110)
            assert status == 200, content
            assert headers["x-fleet-node"] != victim
            assert json.loads(content)["choices"][0]["finish_reason"]
    rows = until(lambda: _with_retry(fleet), "the traces to show the retry")
    assert [row["status"] for row in rows] == ["completed", "retried"]
    assert rows[1]["node_id"] == victim
    assert "retried" in fleet.command("traces").stdout


def _with_retry(fleet: Fleet) -> list[dict[str, object]]:
    rows = fleet.traces()
    retried = [row["request_id"] for row in rows if row["status"] == "retried"]
    both = [row for row in rows if retried and row["request_id"] == retried[0]]
    return both if any(row["status"] == "completed" for row in both) else []


def test_a_killed_agent_comes_back_under_its_name(fleet: Fleet, small_model_path: Path) -> None:
    fleet.agents["a"].kill()
    fleet.start_agent("a", "--embedded", "--model", str(small_model_path))
    fleet.until_online("a", model=MODEL)


def test_the_router_ends_cleanly_and_its_nodes_find_it_again(fleet: Fleet) -> None:
    assert fleet.router.stop() == 0
    fleet.restart_router()
    fleet.until_online("a", "b", model=MODEL)
    status, _, _ = fleet.post("/api/generate", _GENERATE)
    assert status == 200


def test_a_request_of_a_model_whose_nodes_are_away_is_held_until_one_is_back(fleet: Fleet) -> None:
    assert fleet.router.stop() == 0
    fleet.restart_router()  # nobody is online yet, but the router remembers who lists the model
    status, headers, _ = fleet.post(
        "/v1/chat/completions",
        {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    )
    assert status == 200
    assert headers["x-fleet-attempts"] == "1"


def test_an_agent_that_is_stopped_drains_and_ends_with_its_child(fleet: Fleet) -> None:
    children = psutil.Process(fleet.agents["b"].pid).children(recursive=True)
    assert fleet.agents["b"].stop() == 0
    assert not psutil.wait_procs(children, timeout=2)[1]
    assert fleet.node("b")["status"] in ("draining", "offline")


@pytest.mark.parametrize("plug", [signal.SIGKILL, signal.SIGHUP], ids=["kill -9", "terminal closed"])
def test_a_router_that_is_gone_leaves_no_agent_of_its_own(tmp_path: Path, plug: signal.Signals) -> None:
    arguments = ["--with-node", "--no-mdns", "--host", "127.0.0.1", "--port", str(free_port())]
    log = tmp_path / "router.log"
    env = {"FLEET_NODE_PORT": "0"}
    router = Program(log, "herd", *arguments, "--data-dir", str(tmp_path / "data"), env=env)
    try:
        until(lambda: "is online at the router" in router.said(), "the agent to be online")
        children = psutil.Process(router.pid).children(recursive=True)
        assert len(children) == 1
        router.process.send_signal(plug)
        router.process.wait(15)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "the agent outlived its router"
    finally:
        router.close()
