"""`herd join`: how another machine becomes a node. Works with the router running or stopped.

The token holds the join secret, so it stands alone on its line, to be pasted: it is never part of a command,
because commands end up in histories and process lists.
"""

from __future__ import annotations

import argparse
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil

from herd.console import spelling
from herd.console.client import command, complain, print_json
from herd.console.tables import write
from herd.identity import load_or_create_identity, read_router_file, router_urls
from herd_node.protocol.auth import Token, render_token
from herd_node.runtime.addresses import own_addresses
from herd_node.runtime.paths import DataDir

#: What a person runs on the other machine, where it is called by its plain name.
JOIN_COMMAND: Final = "herd-node --join -"
AGENT_PORT: Final = 11436


@command
def run_join(args: argparse.Namespace) -> int:
    """Print the command for the other machine, and the token that it asks for."""
    data_dir = DataDir(Path(args.data_dir))
    identity = load_or_create_identity(data_dir)
    urls = _running_urls(data_dir) or router_urls(args.host or "", args.port, own_addresses())
    token = render_token(Token(identity.router_id, urls, identity.join_secret))
    if args.json:
        print_json({"token": token, "command": JOIN_COMMAND, "router_url": urls[0]})
    else:
        write(_instructions(token, urls, data_dir))
    if all(map(_is_loopback, urls)):
        complain(
            "This router can be reached from this machine alone: it listens on loopback, or no network is up."
        )
    return 0


def _running_urls(data_dir: DataDir) -> tuple[str, ...]:
    """What the running router says of itself: it may listen elsewhere than this command line assumes."""
    router = read_router_file(data_dir)
    if router is None or router.pid is None or not psutil.pid_exists(router.pid):
        return ()
    return router.urls


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _instructions(token: str, urls: tuple[str, ...], data_dir: DataDir) -> list[str]:
    port = urlsplit(urls[0]).port
    here = spelling.command("herd-node", *spelling.in_folder(data_dir.root))
    return [
        "On the other machine, with herd-fleet installed there and its environment active, run",
        "",
        f"    {JOIN_COMMAND}",
        "",
        "and paste this word when it asks:",
        "",
        token,
        "",
        f"Scripts: echo TOKEN | {JOIN_COMMAND}",
        f"The token is a secret: it lets a machine join this herd. It leads to {', '.join(urls)}.",
        f"Firewalls must let TCP port {port} in on this machine and {AGENT_PORT} on the other.",
        f"On this machine no token is needed: {here}",
    ]
