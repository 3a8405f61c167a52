"""Which router this node belongs to, and with which key: the token, what was agreed before, the join file.

The order is docs/protocol.md §5; sources are looked at again on every try, because the join file may appear
later. Once a router has accepted a beat only its id, addresses and the node's own key are kept: the join
secret is written nowhere by the agent.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from herd_node.protocol.auth import Token, key_id, node_key
from herd_node.runtime.chance import new_hex
from herd_node.runtime.paths import DataDir, read_private, write_private

_log = logging.getLogger(__name__)

_AGENT_ID = re.compile(r"[0-9a-f]{16}")
_SECRET_BYTES = 32
_MOST_URLS = 8


class Credential(NamedTuple):
    """A key that a router should accept. `router_id` is None when only the join file vouches for it."""

    source: Literal["token", "agent.json", "join file"]
    router_id: str | None
    urls: tuple[str, ...]
    key: bytes


class KnownRouter(NamedTuple):
    """One entry of agent.json."""

    id: str
    urls: tuple[str, ...]
    key: bytes


class Membership:
    """The credentials of one node id."""

    def __init__(self, data_dir: DataDir, node_id: str, token: Token | None) -> None:
        self._data_dir = data_dir
        self._file = data_dir.node(node_id).agent_file
        self._token = token
        agent_id, self._routers = _read_agent_file(self._file.name, read_private(self._file))
        self.node_id = node_id
        self.agent_id = agent_id or new_hex(8)
        self.key_id = key_id(node_id, self.agent_id)
        if agent_id is None:
            self._write()

    @property
    def routers(self) -> tuple[KnownRouter, ...]:
        return self._routers

    def candidates(self) -> tuple[Credential, ...]:
        """What may be tried, the most wanted first; empty when nothing at all is known."""
        found: list[Credential] = []
        if self._token is not None:
            key = node_key(self._token.secret, self.key_id)
            found.append(Credential("token", self._token.router_id, tuple(self._token.urls), key))
        found += [Credential("agent.json", known.id, known.urls, known.key) for known in self._routers]
        if (secret := self._join_secret()) is not None:
            router_id, urls = local_router(self._data_dir)
            near = tuple(dict.fromkeys((*map(_on_loopback, urls), *urls)))
            found.append(Credential("join file", router_id, near, node_key(secret, self.key_id)))
        return tuple(found)

    def accepted(self, router_id: str, url: str, credential: Credential) -> None:
        """A router took a beat: keep its id, the address that worked first, and the key. v1 keeps one."""
        older = next((known.urls for known in self._routers if known.id == router_id), ())
        urls = tuple(dict.fromkeys((url, *credential.urls, *older)))[:_MOST_URLS]
        routers = (KnownRouter(router_id, urls, credential.key),)
        if routers != self._routers:
            self._routers = routers
            self._write()

    def _write(self) -> None:
        routers = [{"id": one.id, "urls": list(one.urls), "key": one.key.hex()} for one in self._routers]
        text = json.dumps({"agent_id": self.agent_id, "routers": routers}, indent=1)
        write_private(self._file, text.encode())

    def _join_secret(self) -> bytes | None:
        secret = _read(self._data_dir, "join")
        return secret if secret is not None and len(secret) == _SECRET_BYTES else None


def local_router(data_dir: DataDir) -> tuple[str | None, tuple[str, ...]]:
    """Id and addresses of the router on the same data folder, as its router.json tells."""
    raw = _read(data_dir, "router")
    try:
        stated = json.loads(raw) if raw is not None else None
    except ValueError:
        stated = None  # half written or not ours: as good as absent
    if not isinstance(stated, dict):
        return None, ()
    router_id = stated.get("id")
    return router_id if isinstance(router_id, str) else None, _strings(stated.get("urls"))


def _on_loopback(url: str) -> str:
    """The router's data folder is on this machine, so it most likely answers on loopback too."""
    return f"http://127.0.0.1:{url.rpartition(':')[2]}"


def _read(data_dir: DataDir, what: Literal["join", "router"]) -> bytes | None:
    path = data_dir.join_file if what == "join" else data_dir.router_file
    try:
        return read_private(path)
    except OSError as error:
        _log.debug("%s cannot be read: %s", path, error)
        return None


def _read_agent_file(name: str, raw: bytes | None) -> tuple[str | None, tuple[KnownRouter, ...]]:
    """A broken file is a lost membership, said once; the node then joins anew under a new agent id."""
    if raw is None:
        return None, ()
    try:
        stated = json.loads(raw)
        agent_id = stated["agent_id"]
        routers = tuple(_known_router(entry) for entry in stated.get("routers", ()))
        if not isinstance(agent_id, str) or not _AGENT_ID.fullmatch(agent_id):
            raise ValueError("agent_id")
    except (ValueError, KeyError, TypeError, AttributeError):
        _log.warning("%s cannot be understood and is written anew; the node has to join again.", name)
        return None, ()
    return agent_id, routers


def _known_router(entry: Mapping[str, object]) -> KnownRouter:
    router_id, key = entry["id"], entry["key"]
    if not isinstance(router_id, str) or not isinstance(key, str):
        raise ValueError("routers")
    return KnownRouter(router_id, _strings(entry.get("urls")), bytes.fromhex(key))


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()
