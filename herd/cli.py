"""argv → settings → run. Imports that cost time stand inside the commands, so --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import herd

if TYPE_CHECKING:
    from herd.settings import Settings

_EPILOG = "Without a command herd serves. Settings: flag > FLEET_* variable > <data-dir>/herd.toml > default."
#: Flags that are settings; what the command line did not say is absent, so that other sources count.
_SETTINGS = ("host", "port", "data_dir", "log_level", "mdns", "with_node", "allow_net")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 failed or not reachable, 2 usage."""
    args = vars(_parser().parse_args(argv))
    command = args.pop("command", None) or "serve"
    from herd.console.client import complain
    from herd.errors import HerdError, SettingsError

    try:
        return _run(command, args)
    except SettingsError as error:
        complain(f"herd: {error}")
        return 2
    except HerdError as error:
        complain(f"herd: {error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: str, args: dict[str, Any]) -> int:
    from herd.settings import load

    flags = {name: args[name] for name in _SETTINGS if name in args}
    if command not in ("serve", "demo"):
        # A client's own flags say where the router is; what only a server needs is not its business.
        flags = {name: flags[name] for name in ("host", "port", "data_dir") if name in flags}
    settings, warnings = load(flags, config_file=args.get("config"))
    match command:
        case "serve":
            from herd.console.serve import run_serve

            return run_serve(settings, warnings)
        case "demo":
            from herd.console.demo import run_demo

            given = {"port": "port" in flags, "data_dir": "data_dir" in flags}
            return run_demo(settings, warnings, once=bool(args.get("once")), given=given)
    client = argparse.Namespace(
        host=settings.host,
        port=_port_of_the_running(settings) if "port" not in settings.model_fields_set else settings.port,
        data_dir=settings.data_dir,
        json=bool(args.get("json")),
        limit=args.get("limit", 20),
        request_id=args.get("request_id"),
        model=args.get("model"),
        node=args.get("node"),
    )
    return _client(command, client)


def _port_of_the_running(settings: Settings) -> int:
    """Nobody said a port: that of the router which runs on the data folder, else the usual one."""
    from urllib.parse import urlsplit

    import psutil

    from herd.identity import read_router_file
    from herd_node.runtime.paths import DataDir

    router = read_router_file(DataDir(settings.data_dir))
    if router is None or router.pid is None or not router.urls or not psutil.pid_exists(router.pid):
        return settings.port
    return urlsplit(router.urls[0]).port or settings.port


def _client(command: str, args: argparse.Namespace) -> int:
    from herd.console import join, manage, traces, views

    run = {
        "status": views.run_status,
        "nodes": views.run_nodes,
        "models": views.run_models,
        "ps": views.run_ps,
        "traces": traces.run_traces,
        "explain": traces.run_explain,
        "join": join.run_join,
        "pull": manage.run_pull,
        "rm": manage.run_rm,
        "load": manage.run_load,
        "unload": manage.run_unload,
    }[command]
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="herd", description="Many machines, one LLM endpoint.", epilog=_EPILOG
    )
    parser.add_argument("--version", action="version", version=f"herd {herd.__version__}")
    _common(parser)
    _serving(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    demo = commands.add_parser("demo", help="a working fleet on this machine, and one question to it")
    _common(demo)
    _serving(demo)
    demo.add_argument(
        "--once", action="store_true", help="free ports, temporary folder; ends after the answer"
    )
    for name, text in (
        ("status", "the fleet in a few lines"),
        ("nodes", "one line a node"),
        ("models", "one line a model"),
        ("ps", "what is loaded where"),
        ("join", "how another machine becomes a node"),
    ):
        _common(commands.add_parser(name, help=text))
    traces = commands.add_parser("traces", help="the newest requests")
    _common(traces)
    traces.add_argument("--limit", type=_count, default=20, metavar="N", help="how many rows (20)")
    explain = commands.add_parser("explain", help="why a request went where it went")
    _common(explain)
    explain.add_argument("request_id", metavar="REQUEST_ID|last")
    for name, text, where in (
        ("pull", "get a model onto a node", "the one with the most free memory that it fits"),
        ("rm", "delete a model", "every node that has it"),
        ("load", "load a model into memory", "the node that has it and the most free memory"),
        ("unload", "free the memory of a model", "every node that has it"),
    ):
        manage = commands.add_parser(name, help=text)
        _common(manage)
        manage.add_argument("model", metavar="MODEL")
        manage.add_argument("--node", metavar="ID", help=f"where (default: {where})")
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    """Options of every command, before or after it; a subparser's default must not undo a flag."""
    group = parser.add_argument_group("where the router is")
    absent = argparse.SUPPRESS
    group.add_argument("--host", default=absent, help="its address (default: all interfaces / 127.0.0.1)")
    group.add_argument("--port", type=_port, default=absent, help="its port (default: 11435)")
    group.add_argument("--data-dir", default=absent, metavar="DIR", help="its folder (~/.fleet-manager)")
    group.add_argument("--config", default=absent, metavar="FILE", help="settings (<data-dir>/herd.toml)")
    group.add_argument("--json", action="store_true", default=absent, help="print JSON")


def _serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving")
    absent = argparse.SUPPRESS
    levels = ("debug", "info", "warning", "error")
    group.add_argument("--log-level", choices=levels, default=absent, help="least level logged (info)")
    group.add_argument("--no-mdns", dest="mdns", action="store_false", default=absent, help="no announcement")
    group.add_argument(
        "--with-node", action="store_true", default=absent, help="also run a node agent for this machine"
    )
    group.add_argument(
        "--allow-net",
        action="append",
        default=absent,
        metavar="CIDR",
        help="let this network call too (repeatable); loopback and own links always may",
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"a port is a whole number from 0 to 65535, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10_000):
        raise argparse.ArgumentTypeError(f"a number of rows is 1 to 10000, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
