"""`herd-node` as a process: exit codes, one sentence each, tokens, locks, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from herd_node.protocol.auth import Token, render_token
from herd_node.runtime.paths import DataDir, FileLock

TOKEN = render_token(Token("router-1", ("http://127.0.0.1:9",), bytes(range(32))))
HEAVY = ("httpx", "uvicorn", "pydantic", "zeroconf", "psutil", "asyncio", "orjson", "httptools")

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


Finished = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}


def herd_node(
    *arguments: str | Path, said: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "herd_node", *map(str, arguments)]
    return subprocess.run(
        command, input=said, capture_output=True, text=True, timeout=30, env=environment() | env, check=False
    )


@contextmanager
def running(*arguments: str | Path, said: str | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "herd_node", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdin is not None
    if said is not None:
        process.stdin.write(said)
    process.stdin.close()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if words in line:
            return seen
    raise AssertionError(f"it ended without saying {words!r}: {seen}")


def one_sentence(finished: Finished) -> str:
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1, finished.stderr
    return finished.stderr


def test_help_needs_nothing_heavy() -> None:
    probe = (
        "import sys; from herd_node import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: status = end.code\n"
        f"print('LOADED', status, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED 0 []"
    assert "--router-url" in done.stdout


def test_version_is_one_line() -> None:
    done = herd_node("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("herd-node ")


@pytest.mark.parametrize("node_id", ["a b", "", "../x", "x" * 65, "ä"])
def test_an_illegal_node_id_is_a_usage_error(node_id: str, tmp_path: Path) -> None:
    done = herd_node("--data-dir", tmp_path / "d", "--node-id", node_id)
    assert done.returncode == 2
    assert "--node-id" in one_sentence(done)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("token", ["nonsense", TOKEN[:-9], TOKEN.replace("herd1_", "herd2_"), "herd1_"])
def test_a_token_that_does_not_parse_is_a_usage_error_and_is_not_repeated(token: str, tmp_path: Path) -> None:
    for done in (
        herd_node("--data-dir", tmp_path, f"--join={token}"),
        herd_node("--data-dir", tmp_path, "--join", "-", said=token + "\n"),
        herd_node("--data-dir", tmp_path, FLEET_NODE_JOIN=token),
    ):
        assert done.returncode == 2
        assert token not in one_sentence(done) or token == "herd1_"


def test_no_token_on_standard_input_is_a_usage_error(tmp_path: Path) -> None:
    done = herd_node("--data-dir", tmp_path, "--join", "-", said="")
    assert done.returncode == 2
    one_sentence(done)


def test_a_model_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    done = herd_node("--data-dir", tmp_path, "--embedded", "--model", tmp_path / "no.gguf")
    assert done.returncode == 2
    assert "no.gguf" in one_sentence(done)


def test_a_second_agent_with_the_id_on_the_folder_ends_with_one(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    data_dir.ensure()
    data_dir.node("n").ensure()
    with FileLock(data_dir.node("n").lock_file):
        done = herd_node("--data-dir", tmp_path, "--node-id", "n", "--port", "0")
    assert done.returncode == 1
    assert "Another herd-node with the id n" in one_sentence(done)


def test_a_taken_port_ends_with_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = herd_node("--data-dir", tmp_path, "--host", "127.0.0.1", "--port", str(port))
    assert done.returncode == 1
    assert f"Port {port} is already in use" in one_sentence(done)


def test_it_stays_up_alone_says_what_it_waits_for_and_a_signal_ends_it_with_zero(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(
            "--data-dir", tmp_path, "--node-id", "n", "--port", "0", "--backend", "http://127.0.0.1:9"
        ) as process:
            seen = read_until(process, "run `herd join` on the router's machine")
            if "is not ready" not in seen:
                read_until(process, "is not ready")
            process.send_signal(number)
            assert process.wait(10) == 0


def test_a_joined_agent_keeps_the_secret_to_itself(tmp_path: Path) -> None:
    flags = ("--data-dir", tmp_path, "--node-id", "n", "--port", "0", "--join", "-")
    with running(*flags, said=TOKEN + "\n") as process:
        seen = read_until(process, "Waiting for the router at http://127.0.0.1:9")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    secret = bytes(range(32))
    for file in tmp_path.rglob("*"):
        if file.is_file():
            held = file.read_bytes()
            assert secret not in held
            assert secret.hex().encode() not in held
            assert TOKEN.encode() not in held
            assert file.stat().st_mode & 0o077 == 0, file
    assert TOKEN not in seen
    assert json.loads((tmp_path / "nodes" / "n" / "agent.json").read_text())["routers"] == []


def test_a_token_on_the_command_line_is_warned_about(tmp_path: Path) -> None:
    with running("--data-dir", tmp_path, "--node-id", "n", "--port", "0", "--join", TOKEN) as process:
        assert TOKEN not in read_until(process, "can be read in the process list")


def test_an_unknown_variable_is_warned_about(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    data_dir.ensure()
    data_dir.node("n").ensure()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = herd_node("--data-dir", tmp_path, "--host", "127.0.0.1", "--port", port, FLEET_NODE_PROT="1")
    assert "FLEET_NODE_PROT is not a setting" in done.stderr


def test_a_killed_agent_leaves_no_lock_behind(tmp_path: Path) -> None:
    flags = ("--data-dir", tmp_path, "--node-id", "n", "--port", "0")
    for _ in range(2):
        with running(*flags) as process:
            read_until(process, "gateway on port")
            started = time.monotonic()
            process.kill()
            process.wait()
        assert time.monotonic() - started < 5
