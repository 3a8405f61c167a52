"""`herd` as a program: exit codes, flags before and after the command, sentences instead of tracebacks."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from herd import cli
from tests.e2e.kit import Program, free_port, until

CLIENTS = ("status", "nodes", "models", "ps", "traces")
STATUS: dict[str, Any] = {
    "fleet": {
        "nodes_total": 0,
        "nodes_online": 0,
        "models_loaded": 0,
        "requests_active": 0,
        "requests_waiting": 0,
    },
    "nodes": [],
    "queues": {},
    "timestamp": 0.0,
}


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FLEET_"):
            monkeypatch.delenv(name)


class Pretender(http.server.BaseHTTPRequestHandler):
    """Answers as a router would, and remembers what it was asked."""

    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        body = json.dumps({"traces": []} if "traces" in self.path else STATUS).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def pretender(host: str = "127.0.0.1") -> Iterator[tuple[int, list[str]]]:
    handler = type("Handler", (Pretender,), {"asked": []})
    with http.server.HTTPServer((host, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port, handler.asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("command", CLIENTS)
def test_flags_mean_the_same_before_and_after_the_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The trap of argparse: a subparser's default undoes what stood before it."""
    with pretender() as (port, asked):
        flags = ["--port", str(port), "--data-dir", str(tmp_path), "--json"]
        for line in ([*flags, command], [command, *flags], [*flags[:2], command, *flags[2:]]):
            assert cli.main(line) == 0, line
            json.loads(capsys.readouterr().out)
        assert len(asked) == 3


@pytest.mark.parametrize("host", ["0.0.0.0", "", "*", "::", "[::]", "127.0.0.1"])
def test_a_wildcard_is_reached_on_loopback(host: str, tmp_path: Path):
    with pretender() as (port, asked):
        line = ["--host", host, "--port", str(port), "--data-dir", str(tmp_path), "status"]
        assert cli.main(line) == 0
        assert len(asked) == 1


def test_a_client_command_takes_its_place_from_variables_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pretender() as (port, asked):
        (tmp_path / "herd.toml").write_text(f"port = {port}\nhost = '0.0.0.0'")
        assert cli.main(["status", "--data-dir", str(tmp_path)]) == 0
        monkeypatch.setenv("FLEET_PORT", str(port))
        monkeypatch.setenv("FLEET_DATA_DIR", str(tmp_path / "none"))
        assert cli.main(["status"]) == 0
        assert len(asked) == 2


@pytest.mark.parametrize("command", [*CLIENTS, "explain"])
def test_nobody_there_is_exit_1_and_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["last"] if command == "explain" else []
    assert cli.main([command, *more, "--port", str(free_port()), "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    "line",
    [
        ["nonsense"],
        ["--nonsense"],
        ["--port"],
        ["--port", "x"],
        ["--port", "-1"],
        ["--port", "65536"],
        ["--port", "١"],
        ["status", "--port", "x"],
        ["traces", "--limit", "0"],
        ["traces", "--limit", "x"],
        ["traces", "--limit", "10001"],
        ["explain"],
        ["status", "extra"],
        ["--log-level", "loud"],
        ["status", "--mdns"],
        ["status", "--allow-net", "10.0.0.0/8"],
    ],
)
def test_wrong_usage_is_exit_2(line: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "env", "file", "words"),
    [
        (["--allow-net", "nowhere"], {}, "", "--allow-net"),
        (["status"], {"FLEET_PORT": "x"}, "", "FLEET_PORT"),
        (["status"], {}, "prot = 1", "unknown key prot"),
        (["status"], {}, "port = ", "not valid TOML"),
        (["--config", "/nowhere/herd.toml"], {}, "", "no such file"),
    ],
)
def test_wrong_settings_are_exit_2_and_one_sentence(
    line: list[str],
    env: dict[str, str],
    file: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / "herd.toml").write_text(file)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main([*line, "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), words in said) == (1, True)


def test_join_works_without_a_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--json", "join", "--data-dir", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"token", "command", "router_url"}
    assert said["token"].startswith("herd1_")
    assert said["token"] not in said["command"]


_HEAVY = ("httpx", "pydantic", "starlette", "uvicorn", "asyncio", "orjson", "zeroconf", "jinja2", "sqlite3")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, contextlib\n"
        "from herd import cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['--help'])\n"
        "print([name for name in sys.argv[1:] if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *_HEAVY], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Many machines, one LLM endpoint." in done.stdout


@pytest.mark.slow
def test_help_is_instant():
    took_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        subprocess.run([sys.executable, "-m", "herd", "--help"], capture_output=True, timeout=30, check=True)
        took_s.append(time.perf_counter() - began_s)
    assert min(took_s) < 0.15


def herd(tmp_path: Path, *line: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
    return subprocess.run(
        [sys.executable, "-m", "herd", "--no-mdns", "--data-dir", str(tmp_path), *line],
        capture_output=True,
        text=True,
        timeout=30,
        env=clean,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.slow
def test_a_port_that_is_taken_is_exit_1_and_one_sentence(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = herd(tmp_path, "--host", "127.0.0.1", "--port", port)
    assert (done.returncode, done.stdout) == (1, "")
    sentence = f"Port {port} is already in use on this machine; choose another one with --port."
    assert done.stderr == f"herd: {sentence}\n"


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_exit_1_and_one_sentence(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    for folder in (file, file / "below"):
        done = herd(folder, "--host", "127.0.0.1", "--port", "0")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "cannot be used" in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_a_router_serves_says_where_refuses_a_second_one_and_ends_with_its_signal(tmp_path: Path):
    port = free_port()
    arguments = ["--no-mdns", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(tmp_path)]
    program = Program(tmp_path / "log", "herd", *arguments, env={"FLEET_PROT": "1"})
    try:
        until(lambda: f"http://127.0.0.1:{port}" in program.said(), "the banner")
        said = program.said()
        for line in ("OpenAI base URL", "Ollama host", "Dashboard", "/fleet/status", "join"):
            assert line in said
        assert "FLEET_PROT is not a setting" in said

        second = herd(tmp_path, "--host", "127.0.0.1", "--port", "0")
        assert (second.returncode, second.stderr.count("\n")) == (1, 1)
        assert "A router already runs on" in second.stderr

        for command in CLIENTS:
            done = _client(tmp_path, port, command)
            assert (done.returncode, done.stderr) == (0, ""), (command, done)
        assert json.loads((tmp_path / "router.json").read_text())["pid"] == program.pid
    finally:
        program.process.send_signal(signal.SIGTERM)
        code = program.process.wait(20)
        program.close()
    assert code == 0
    assert json.loads((tmp_path / "router.json").read_text())["pid"] is None
    assert "Traceback" not in program.said()
    # the folder is free again
    done = _client(tmp_path, port, "status")
    assert (done.returncode, "No router answers" in done.stderr) == (1, True)


def _client(tmp_path: Path, port: int, command: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "herd", "--port", str(port), command, "--data-dir", str(tmp_path)]
    return subprocess.run(line, capture_output=True, text=True, timeout=30)
