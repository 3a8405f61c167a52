"""`herd demo`: one command gives a working fleet on a real model, and asks it one question.

It is `herd` in this process and `herd-node --embedded` as its child; neither knows that it is a demo.

1. a router already runs on the data folder: ask that one
2. the engine is missing: say how to get it; the model is missing: fetch it, with progress
3. a taken port becomes a free one, said in one line
4. start both, wait until a model can answer, ask, show the answer and who gave it
5. go on serving until Ctrl-C; with `--once` end here, and leave nothing behind but the model file
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from herd.app import Router
from herd.console.ask import Answer, ask, first_model
from herd.console.serve import AgentProcess, banner, run_router
from herd.console.tables import write
from herd.errors import HerdError, StartError
from herd.identity import read_router_file
from herd.settings import Settings
from herd_node.net.server import StartPortTaken, bind, port_of
from herd_node.runtime.paths import DataDir, FileLock

_AGENT_PORT = 11436
_READY_S = 180.0
_LOOK_S = 0.1
_SMALL_MODEL = "smollm2:135m"


def run_demo(settings: Settings, warnings: Sequence[str], *, once: bool, given: dict[str, bool]) -> int:
    """Exit code 0 after the answer (or after Ctrl-C), 1 with one sentence otherwise."""
    running = None if once else _running_url(settings)
    if running is not None:
        return _ask_running(running)
    model_file = _fetch_model(DataDir(settings.data_dir))
    with contextlib.ExitStack() as stack:
        if once:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="herd-demo-"))
            settings = settings.model_copy(
                update={"data_dir": Path(folder), "port": 0, "host": "127.0.0.1", "mdns": False}
            )
        else:
            settings = _with_free_port(settings, chosen=given["port"])
        return _Demo(settings, model_file, once=once).run(warnings)


class _Demo:
    def __init__(self, settings: Settings, model_file: Path, *, once: bool) -> None:
        self._once = once
        self._router = Router(settings)
        port = 0 if once or not _is_free(_AGENT_PORT) else _AGENT_PORT
        if port == 0 and not once:
            write([f"Port {_AGENT_PORT} is taken; the agent uses a free one."])
        arguments = ["--embedded", "--model", str(model_file), "--port", str(port)]
        if once:
            arguments += ["--node-id", "demo"]
        self._agent = AgentProcess(self._router, *arguments, quiet=True)
        self._failure: HerdError | None = None

    def run(self, warnings: Sequence[str]) -> int:
        run_router(self._router, warnings, self._show, self._agent)
        if self._failure is not None:
            raise self._failure
        return 0

    async def _show(self) -> None:
        try:
            await self._start_and_ask()
        except HerdError as error:
            self._failure = error
            self._router.stop()
            return
        if self._once:
            self._router.stop()
        else:
            write(["", *banner(self._router), "", "Ctrl-C ends it."])

    async def _start_and_ask(self) -> None:
        write(["Starting a router, an agent and a llama.cpp server with SmolLM2-135M ..."])
        child = self._router.tasks.spawn(self._agent.run(), name="node agent")
        await self._until_ready(child)
        for line in self._other_backends():
            write([line])
        write([f"Asking {_SMALL_MODEL} through the router:", ""])
        url = f"http://127.0.0.1:{self._router.port}"
        answer = await asyncio.to_thread(ask, url, _SMALL_MODEL, _say)
        write(["", "", _served(answer)])

    async def _until_ready(self, child: asyncio.Task[None]) -> None:
        clock = self._router.clock
        began_s = clock.now_s()
        while not self._has_model():
            if child.done():
                raise HerdError("The node agent ended before it was ready; its log is in the data folder.")
            if clock.now_s() - began_s > _READY_S:
                raise HerdError(f"No model was ready after {_READY_S:.0f} s. {self._why_not()}")
            await clock.sleep(_LOOK_S)

    def _has_model(self) -> bool:
        snapshot = self._router.registry.snapshot(self._router.clock.now_s())
        holders = snapshot.holders.get(_SMALL_MODEL, ())
        return any(node.status == "online" and one.state == "hot" for node, one in holders)

    def _why_not(self) -> str:
        rows = self._router.registry.nodes_for_status(self._router.clock.now_s())
        reasons = [row.reason for row in rows if row.reason]
        reasons += [backend.reason for row in rows for backend in row.backends if backend.reason]
        return " ".join(reasons)

    def _other_backends(self) -> list[str]:
        rows = self._router.registry.nodes_for_status(self._router.clock.now_s())
        return [
            f"Also used: {backend.id} ({backend.kind} {backend.version or ''}), found on this machine."
            for row in rows
            for backend in row.backends
            if backend.ready and backend.id != "embedded"
        ]


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _served(answer: Answer) -> str:
    rate = f", {answer.tokens_per_s:.0f} tokens/s" if answer.tokens_per_s is not None else ""
    return (
        f"Served by node {answer.node} with {answer.model}, score {answer.score}: "
        f"first token after {answer.first_token_s * 1000:.0f} ms{rate}."
    )


def _running_url(settings: Settings) -> str | None:
    """Where the router of this data folder answers, when one holds its lock."""
    data_dir = DataDir(settings.data_dir)
    if not data_dir.lock_file.exists():
        return None
    lock = FileLock(data_dir.lock_file)
    if lock.acquire():
        lock.release()
        return None
    router = read_router_file(data_dir)
    if router is None or not router.urls:
        raise StartError(f"A router is just starting on {data_dir.root}; try again in a second.")
    return router.urls[0]


def _ask_running(url: str) -> int:
    model = first_model(url)
    if model is None:
        raise HerdError(f"A router runs at {url}, but no node of it has a model that can chat yet.")
    write([f"A router already runs at {url}; asking {model} there:", ""])
    answer = ask(url, model, _say)
    write(["", "", _served(answer)])
    return 0


def _fetch_model(data_dir: DataDir) -> Path:
    """The small model's file. Says beforehand what it will load from the network."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise HerdError(
            "The llama.cpp engine (about 40 MB) is not installed; run "
            f"{sys.executable} -m pip install 'herd-fleet[embedded]' (or '.[embedded]' in a checkout)."
        )
    data_dir.ensure()
    write(
        [
            "herd demo needs a llama.cpp engine (xllamacpp, 40 MB: installed) and the model SmolLM2-135M",
            f"(98 MB, fetched once into {data_dir.models}).",
        ]
    )
    command = [sys.executable, "-m", "herd_node.fetch", str(data_dir.models)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise HerdError("The model could not be fetched; run this again to go on.")
    return Path(done.stdout.decode().strip())


def _with_free_port(settings: Settings, *, chosen: bool) -> Settings:
    """A port that somebody asked for is not changed: then the start fails with its sentence."""
    if chosen or _is_free(settings.port, settings.host):
        return settings
    sockets = bind(settings.host, 0)
    port = port_of(sockets)
    for sock in sockets:
        sock.close()
    write([f"Port {settings.port} is taken; the router uses {port}: give other commands --port {port}."])
    return settings.model_copy(update={"port": port})


def _is_free(port: int, host: str = "") -> bool:
    try:
        sockets = bind(host, port)
    except StartPortTaken:
        return False
    for sock in sockets:
        sock.close()
    return True
