"""argv → settings → run. Imports stand inside the command, so that --help answers at once.

Exit codes: 0 done, 1 cannot start, 2 usage. One sentence on standard error, never a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from herd_node.membership import Membership
    from herd_node.protocol.auth import Token
    from herd_node.runtime.paths import DataDir
    from herd_node.settings import Settings

DONE, FAILED, USAGE = 0, 1, 2


class _Stop(Exception):
    """End with this status, after this sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return _run(_flags(_parser().parse_args(argv)))
    except _Stop as stop:
        print(f"herd-node: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="herd-node",
        description="The agent of one machine: it wraps the local LLM servers and serves its herd router.",
        epilog="Every flag has a variable: FLEET_NODE_ and the flag's name (FLEET_NODE_ROUTER_URL, ...); "
        "--node-id is FLEET_NODE_ID. docs/settings.md lists them all.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--router-url", metavar="URL", help="the router; default: a known one, else found by mDNS")
    add("--node-id", metavar="ID", help="default: the host name")
    add("--backend", metavar="URL", action="append", help="a local server; repeatable; its kind is detected")
    add("--embedded", action="store_true", help="run a llama.cpp server of its own")
    add("--model", metavar="FILE.gguf", help="for --embedded; default: a small model, fetched once (98 MB)")
    add("--models-dir", metavar="DIR", help="where GGUF files are pulled to; default: in the data folder")
    add("--host", help="address of the gateway; default: as near as the router is; * is every interface")
    add("--port", help="port of the gateway (11436)")
    add("--data-dir", metavar="DIR", help="default: ~/.fleet-manager")
    add("--heartbeat-interval", metavar="SECONDS", help="default: 5")
    add("--join", metavar="TOKEN", help="join a router; - reads the token from standard input (safer)")
    add("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    add("--end-with-stdin", action="store_true", help=argparse.SUPPRESS)  # how `herd` starts its own agent
    add("--version", action=_ShowVersion, nargs=0, help="show the version and end")
    return parser


class _ShowVersion(argparse.Action):
    """Found out only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_given: object) -> None:
        from importlib.metadata import version

        print(f"herd-node {version('herd-fleet')}")
        parser.exit()


def _flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the command line said, under the settings' names."""
    flags = vars(parsed)
    if "node_id" in flags:
        flags["id"] = flags.pop("node_id")
        if not flags["id"]:
            raise _Stop(USAGE, "--node-id: must be 1 to 64 characters of A-Z a-z 0-9 . _ -")
    if "backend" in flags:
        flags["backend"] = tuple(flags["backend"])
    return flags


def _run(flags: dict[str, Any]) -> int:
    if flags.pop("end_with_stdin", False):
        _end_with_stdin()
    from herd_node.runtime import logs
    from herd_node.runtime.paths import DataDir, FileLock
    from herd_node.settings import SettingsError, load

    try:
        settings, warnings = load(flags)
    except SettingsError as error:
        raise _Stop(USAGE, str(error)) from None
    if settings.model is not None and not settings.model.is_file():
        raise _Stop(USAGE, f"--model: there is no file {settings.model}")
    token = _token(settings.join)
    data_dir = DataDir(settings.data_dir)
    try:
        data_dir.ensure()
        node_dir = data_dir.node(settings.node_id)
        node_dir.ensure()
    except OSError as error:
        raise _Stop(FAILED, f"The data folder {data_dir.root} cannot be used: {error.strerror}.") from None
    lock = FileLock(node_dir.lock_file)
    if not lock.acquire():
        raise _Stop(
            FAILED,
            f"Another herd-node with the id {settings.node_id} runs on {data_dir.root}; "
            "give this one another --node-id.",
        )
    file = data_dir.logs / f"herd-node-{settings.node_id}.jsonl"
    closer = logs.setup(file=file, level=settings.log_level, console="quiet")
    try:
        for warning in warnings:
            _warn(warning)
        if "join" in flags and settings.join != "-":
            _warn("A token on the command line can be read in the process list; `--join -` asks for it.")
        return _serve(settings, data_dir, token)
    finally:
        closer.close()
        lock.release()


def _end_with_stdin() -> None:
    """A signal to ourselves when whoever started us is gone, so that its `kill -9` leaves no agent behind."""
    import os
    import signal
    import threading

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="standard input", daemon=True).start()


def _serve(settings: Settings, data_dir: DataDir, token: Token | None) -> int:
    import asyncio
    import logging

    from herd_node import agent
    from herd_node.membership import Membership
    from herd_node.net.server import StartPortTaken, bind, port_of
    from herd_node.runtime.clock import SystemClock
    from herd_node.runtime.garbage import look_seldom
    from herd_node.runtime.limits import raise_open_files
    from herd_node.settings import surroundings

    raise_open_files()
    look_seldom()
    membership = Membership(data_dir, settings.node_id, token)
    host = settings.host or _default_host(settings, membership)
    try:
        sockets = bind(host, settings.port)
    except StartPortTaken as error:
        raise _Stop(FAILED, str(error)) from None
    logging.getLogger("herd_node").info(
        "herd-node %s: node %s, gateway on port %d of %s",
        agent.agent_version(),
        settings.node_id,
        port_of(sockets),
        "all interfaces" if host == "*" else host,
    )
    start = agent.Start(
        settings=settings,
        surroundings=surroundings(),
        data_dir=data_dir,
        membership=membership,
        sockets=sockets,
        clock=SystemClock(),
    )
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(agent.run(start))
    return DONE


def _token(join: str) -> Token | None:
    from herd_node.protocol.auth import TokenError, parse_token

    if not join:
        return None
    try:
        return parse_token(_read_token() if join == "-" else join)
    except TokenError as error:
        raise _Stop(USAGE, f"--join: {error}") from None


def _read_token() -> str:
    """One line; on a terminal it is asked for and not shown."""
    if sys.stdin is not None and sys.stdin.isatty():
        from getpass import getpass

        try:
            return getpass("Token from `herd join`: ")
        except EOFError:
            return ""
    return sys.stdin.readline() if sys.stdin is not None else ""


def _default_host(settings: Settings, membership: Membership) -> str:
    """As near as the router is: loopback for one on this machine's loopback, else every interface."""
    from urllib.parse import urlsplit

    known = [url for credential in membership.candidates()[:1] for url in credential.urls]
    first = settings.router_url or (known[0] if known else "")
    near = urlsplit(first).hostname in ("127.0.0.1", "::1", "localhost")
    return "localhost" if near else "*"


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.Loop


def _warn(sentence: str) -> None:
    import logging

    logging.getLogger("herd_node").warning("%s", sentence)
