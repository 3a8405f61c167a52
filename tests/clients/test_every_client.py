"""Every client that people use does everything it can, on every kind of node, and notices no router.

Each test is one deed; its parameters are the cells of `cells.py`. What only a client can see (the end of a
stream, counters) is checked where it runs: in `programs/` and `npm/program.mjs`.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from tests.clients.cells import BACKENDS, CLIENTS, DEEDS, LEFT_OUT, Cell, Tally, cells_of
from tests.clients.kit import PATIENCE_S, ROOT, Program, Stage
from tests.e2e.kit import until

pytestmark = [pytest.mark.e2e, pytest.mark.llama, pytest.mark.slow]

FREE_WITHIN_S = 1.0
Programs = Callable[[str], Program]


def does(deed: str) -> pytest.MarkDecorator:
    cells = [pytest.param(cell, id=f"{cell.client}-{cell.backend}") for cell in cells_of(deed)]
    return pytest.mark.parametrize("cell", cells)


def is_what_the_model_says(text: str, backend: str) -> None:
    expected = BACKENDS[backend].text
    if expected is None:
        assert text.strip()
    else:
        assert text == expected


@does("chat")
def test_it_chats(program: Programs, cell: Cell) -> None:
    text = program(cell.client).do("chat", model=BACKENDS[cell.backend].chat)
    is_what_the_model_says(text, cell.backend)


@does("stream")
def test_it_streams_in_pieces(program: Programs, cell: Cell) -> None:
    pieces = program(cell.client).do("stream", model=BACKENDS[cell.backend].chat)
    assert len(pieces) > 3
    is_what_the_model_says("".join(pieces), cell.backend)


@does("tools")
def test_it_calls_a_tool_and_hears_of_the_result(program: Programs, cell: Cell) -> None:
    name, arguments, then = program(cell.client).do("tools", model=BACKENDS[cell.backend].tools)
    assert (name, arguments) == ("get_weather", {"city": "Oslo"})
    is_what_the_model_says(then, cell.backend)


@does("embeddings")
def test_it_embeds_two_texts(program: Programs, cell: Cell) -> None:
    backend = BACKENDS[cell.backend]
    vectors = program(cell.client).do("embeddings", model=backend.embeddings)
    assert [len(vector) for vector in vectors] == [backend.vector_length] * 2
    assert vectors[0] != vectors[1]
    assert [math.hypot(*vector) for vector in vectors] == [pytest.approx(1, abs=1e-3)] * 2


@does("structured")
def test_it_gets_an_answer_by_its_schema(program: Programs, cell: Cell) -> None:
    picked = program(cell.client).do("structured", model=BACKENDS[cell.backend].chat)
    assert picked.keys() == {"colour"}
    assert picked["colour"] in ("red", "green", "blue")


@does("models")
def test_it_lists_the_models_of_both_backends(program: Programs, cell: Cell) -> None:
    backend = BACKENDS[cell.backend]
    listed = program(cell.client).do("models")
    assert {backend.chat, backend.tools, backend.embeddings} <= set(listed)
    assert len(listed) == len(set(listed))


@does("unknown")
def test_it_hears_that_there_is_no_such_model(program: Programs, cell: Cell) -> None:
    classes, status, word = program(cell.client).do("unknown")
    error = CLIENTS[cell.client]
    assert error.raised in classes
    assert (status, word) == (404, error.word)


@does("cancel")
def test_its_slot_is_free_within_a_second_after_it_left(
    stage: Stage, program: Programs, tally: Tally, cell: Cell
) -> None:
    backend = BACKENDS[cell.backend]
    before = stage.requests()
    with stage.talking_slowly():
        client = program(cell.client)
        client.do("begin", model=backend.watched)
        assert stage.busy(backend)
        client.do("leave")
        left_s = time.monotonic()
        until(lambda: not stage.busy(backend), "the slot to be free", patience_s=10)
        took_s = time.monotonic() - left_s
    tally.freed_after_s.append(took_s)
    assert took_s < FREE_WITHIN_S
    row = stage.row_since(before, backend.watched)
    assert (row["status"], row["finish_reason"]) == ("client_gone", None)
    assert row["time_to_first_token_ms"] is not None


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_the_command_of_llm_answers_once(stage: Stage, backend) -> None:
    command = [sys.executable, "-m", "llm", "prompt", "-m", f"ollama/{backend.chat}", "Name three colours."]
    done = subprocess.run(
        [*command, "-o", "num_predict", "16"],
        env=stage.client_env(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    is_what_the_model_says(done.stdout.removesuffix("\n"), backend.name)


def test_the_fleet_uses_no_proxy_of_its_environment(stage: Stage) -> None:
    """Everything above was served; nothing listens where these lead."""
    fleet = stage.fleet
    for process in (fleet.router, *fleet.agents.values()):
        found = psutil.Process(process.pid).environ()
        assert found["HTTP_PROXY"].startswith("http://127.0.0.1:")
        assert "NO_PROXY" not in found
        assert found["HTTPS_PROXY"] == found["ALL_PROXY"] == found["http_proxy"] == found["HTTP_PROXY"]


def test_what_is_left_out_would_be_a_cell_otherwise() -> None:
    assert {client for client, _ in LEFT_OUT} <= CLIENTS.keys()
    assert {deed for _, deed in LEFT_OUT} <= set(DEEDS)


def test_the_page_names_every_client_and_what_it_is_not_asked_to_do() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    _, _, section = page.partition("\n## Clients\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    told = {row.split("`")[1]: row.split("|")[2] for row in rows}
    assert list(told) == list(CLIENTS)
    for client, text in told.items():
        assert bool(text.strip()) is any(left == client for left, _ in LEFT_OUT), client
