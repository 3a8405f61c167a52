"""`herd` without a command: the router in the foreground, and with `--with-node` an agent as its child."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from herd.app import Router
from herd.console import spelling
from herd.console.tables import write
from herd.settings import Settings
from herd_node.runtime import logs
from herd_node.runtime.clock import Clock
from herd_node.runtime.garbage import look_seldom
from herd_node.runtime.limits import raise_open_files
from herd_node.runtime.tasks import supervise

_log = logging.getLogger(__name__)
_CHILD_STOP_S = 5.0


def run_serve(settings: Settings, warnings: Sequence[str]) -> int:
    """Serve until a signal. Raises StartError."""
    router = Router(settings, join_command=_join_command(settings))
    agent = AgentProcess(router) if settings.with_node else None

    async def started() -> None:
        write(banner(router))
        if agent is not None:
            await supervise(agent.run, name="node agent", clock=router.clock)

    run_router(router, warnings, started, agent)
    return 0


def run_router(
    router: Router,
    warnings: Sequence[str],
    started: Callable[[], Coroutine[Any, Any, None]],
    agent: AgentProcess | None,
) -> None:
    """Open, log, run on the fastest loop there is, and leave nothing running. Raises StartError."""
    raise_open_files()
    look_seldom()
    router.open()
    closer = logs.setup(
        file=router.data_dir.logs / "herd.jsonl", level=router.settings.log_level, console="quiet"
    )
    try:
        for warning in warnings:
            _log.warning("%s", warning)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_run(router, started, agent))
    finally:
        router.close()
        closer.close()


async def _run(
    router: Router, started: Callable[[], Coroutine[Any, Any, None]], agent: AgentProcess | None
) -> None:
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not under nohup
        # The terminal was closed: a stop like any other, else the agent would outlive us.
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, router.stop)
    try:
        await router.run(started)
    finally:
        if agent is not None:
            await agent.stop()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _join_command(settings: Settings) -> str:
    return spelling.command("herd", "join", *spelling.in_folder(settings.data_dir))


def banner(router: Router) -> list[str]:
    """What a person needs next: where it is, and how to go on."""
    local = f"http://127.0.0.1:{router.port}"
    others = [url for url in router.urls if "127.0.0.1" not in url]
    where = f"herd serves on {local}" + (f" and {', '.join(others)}" if others else "")
    return [
        where,
        f"  OpenAI base URL   {local}/v1",
        f"  Ollama host       {local}",
        f"  Dashboard         {local}/dashboard",
        f"  State             {local}/fleet/status",
        f"  Add a machine     {_join_command(router.settings)}",
    ]


class AgentProcess:
    """`herd-node` as a child: it joins by the data folder, so no token is needed."""

    def __init__(self, router: Router, *arguments: str, quiet: bool = False) -> None:
        self._router = router
        self._arguments = arguments
        self._quiet = quiet
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    async def run(self) -> None:
        """Start it and wait for its end; an end that nobody asked for is an error."""
        settings, clock = self._router.settings, self._router.clock
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "herd_node",
            "--router-url",
            _local_url(self._router),
            "--data-dir",
            str(settings.data_dir),
            "--end-with-stdin",
            *self._arguments,
            # It reads the end of this pipe when we are gone, however we went (`kill -9`).
            stdin=asyncio.subprocess.PIPE,
            # Its own group: a Ctrl-C reaches us alone, and we stop it in order.
            start_new_session=sys.platform != "win32",
            env={**os.environ, "FLEET_NODE_LOG_LEVEL": "warning" if self._quiet else settings.log_level},
        )
        code = await self._process.wait()
        if self._stopping:
            await _never(clock)
        raise AgentEnded(f"the node agent ended by itself (exit code {code})")

    async def stop(self) -> None:
        """SIGTERM, then, if it does not end, SIGKILL."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        if sys.platform == "win32":
            process.terminate()
        else:
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_CHILD_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class AgentEnded(RuntimeError):
    """The child is gone."""


async def _never(clock: Clock) -> None:
    while True:
        await clock.sleep(3600)


def _local_url(router: Router) -> str:
    host = router.settings.host
    if host in ("", "*", "0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{router.port}" if ":" in host else f"http://{host}:{router.port}"
