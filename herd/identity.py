"""Who this router is, kept in the data folder: its id and the join secret, stable over restarts.

Used by the running router and by `herd join`, in whatever order they come: whoever is first makes them, both
then hold the same. Nothing here prints, logs or sends the secret.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Final

from herd.errors import StartError
from herd_node.protocol.names import is_node_id
from herd_node.runtime.chance import new_hex, new_secret
from herd_node.runtime.paths import DataDir, create_private, read_private, write_private

SECRET_BYTES: Final = 32
_ROUTER_ID_BYTES: Final = 8
#: As many as a join token may name.
MAX_URLS: Final = 16
_BRIDGES: Final = ip_network("172.16.0.0/12")
_WILDCARDS: Final = frozenset({"", "*", "0.0.0.0", "::", "[::]"})


@dataclass(frozen=True, slots=True)
class Identity:
    """`join_secret` is what every node's key is derived from; it never appears in a `repr`."""

    router_id: str
    join_secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class RouterFile:
    """`router.json`: what the running router says of itself. `boot` and `pid` are None when none runs."""

    router_id: str
    boot: str | None = None
    pid: int | None = None
    urls: tuple[str, ...] = ()
    """Where agents reach it, the best address first."""


def load_or_create_identity(data_dir: DataDir) -> Identity:
    """Read id and secret, making what is missing. Raises StartError when the folder does not allow it."""
    try:
        data_dir.ensure()
        return Identity(_router_id(data_dir), _join_secret(data_dir))
    except OSError as error:
        raise StartError(
            f"The data folder {data_dir.root} cannot be used: {error.strerror or error}."
        ) from error


def read_router_file(data_dir: DataDir) -> RouterFile | None:
    """None when there is no such file, or it is not what we write."""
    return _parse(read_private(data_dir.router_file))


def write_router_file(data_dir: DataDir, router: RouterFile) -> None:
    """Say where this router is: at the start, and, without boot, pid and URLs, at the end."""
    write_private(data_dir.router_file, _rendered(router))


def router_urls(host: str, port: int, own_addresses: Sequence[str]) -> tuple[str, ...]:
    """Where agents reach a router that listens on `host`: the likeliest LAN address first; else loopback.

    Link-local IPv6 addresses need a zone that only their own machine knows, so they are left out.
    172.16.0.0/12 comes late: on most machines that have it, it is a bridge of containers.
    """
    if host not in _WILDCARDS:
        return (_url(host, port),)
    addresses = [ip_address(address) for address in own_addresses]
    lan = [a for a in addresses if not (a.is_loopback or a.is_link_local or a.is_multicast)]
    chosen = sorted(lan, key=lambda a: (a.version, a in _BRIDGES)) or [ip_address("127.0.0.1")]
    return tuple(_url(str(address), port) for address in chosen[:MAX_URLS])


def _url(host: str, port: int) -> str:
    host = host.strip("[]")
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _router_id(data_dir: DataDir) -> str:
    if (found := read_router_file(data_dir)) is not None:
        return found.router_id
    made = RouterFile(new_hex(_ROUTER_ID_BYTES))
    # Two may be here at once: create_private lets one win and tells both who did.
    found = _parse(create_private(data_dir.router_file, _rendered(made)))
    if found is None:  # there is a file, and it is damaged
        write_router_file(data_dir, made)
        return made.router_id
    return found.router_id


def _join_secret(data_dir: DataDir) -> bytes:
    secret = read_private(data_dir.join_file)
    if secret is None:
        secret = create_private(data_dir.join_file, new_secret())
    if len(secret) != SECRET_BYTES:
        # Never replaced unasked: every node that has joined would be locked out.
        raise StartError(
            f"{data_dir.join_file} does not hold a join secret; remove it to have a new one made"
            " (every node must join again then)."
        )
    return secret


def _rendered(router: RouterFile) -> bytes:
    fields = {"id": router.router_id, "boot": router.boot, "pid": router.pid, "urls": list(router.urls)}
    return json.dumps(fields, indent=2).encode() + b"\n"


def _parse(data: bytes | None) -> RouterFile | None:
    try:
        fields = json.loads(data or b"")
    except (ValueError, RecursionError):
        return None
    match fields:
        case {"id": str(router_id), **rest} if is_node_id(router_id):
            boot, pid, urls = rest.get("boot"), rest.get("pid"), rest.get("urls")
            return RouterFile(
                router_id,
                boot if isinstance(boot, str) else None,
                pid if isinstance(pid, int) else None,
                tuple(url for url in urls if isinstance(url, str)) if isinstance(urls, list) else (),
            )
    return None
