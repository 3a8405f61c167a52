"""Who may speak: signatures of beats, calls and replies, replay protection, and the join token.

Pure state and functions: no clock, no chance, no I/O. Every gate is asked after the mac was found good, so
what a stranger sends changes nothing. Normative text: docs/protocol.md §2 and §5.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
from array import array
from collections.abc import Callable
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from herd_node.protocol.forms import Body
from herd_node.protocol.names import is_node_id

HEADER = b"x-herd-auth"
MAX_SEQ = 2**53 - 1
_MAX_SEQ_DIGITS = len(str(MAX_SEQ))

Direction = Literal["beat", "call", "reply"]

_SCHEME = "herd1"
_NOBODY = "-"
_BLOCK_BYTES = 64
_INNER_PAD = bytes(byte ^ 0x36 for byte in range(256))
_OUTER_PAD = bytes(byte ^ 0x5C for byte in range(256))
_BOOT = re.compile(r"[0-9a-f]{16}")
_VERSION = re.compile(r"[0-9]{1,9}")
_HEADER = re.compile(
    r"1 (?P<key_id>[A-Za-z0-9._-]{1,64}/[0-9a-f]{16}) (?P<sender>[0-9a-f]{16}) (?P<receiver>[0-9a-f]{16}|-)"
    r" (?P<seq>[1-9][0-9]{0,15}) (?P<hash>[0-9a-f]{64}) (?P<mac>[0-9a-f]{64})"
)


class AuthError(ValueError):
    """An X-Herd-Auth that cannot be read. `status` is the answer: 400 malformed, 401 missing, 426 version."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class AuthHeader(NamedTuple):
    """The fields of X-Herd-Auth, well-formed but not yet believed."""

    key_id: str
    sender_boot: str
    receiver_boot: str | None
    seq: int
    body_sha256: str
    mac: str


class Refusal(NamedTuple):
    """Why a well-signed message is not accepted. `boot` is what a 401 tells the sender to name instead."""

    status: int
    reason: str
    boot: str | None = None


def is_boot(text: object) -> bool:
    """16 lower-case hex digits; agent ids have the same form."""
    return isinstance(text, str) and _BOOT.fullmatch(text) is not None


def parse_auth(value: str) -> AuthHeader:
    """The header's fields. Raises AuthError."""
    if not value:
        raise AuthError("The request is not signed: X-Herd-Auth is missing.", 401)
    found = _HEADER.fullmatch(value)
    if found is None:
        version = value.partition(" ")[0]
        if version != "1" and _VERSION.fullmatch(version):
            raise AuthError(f"X-Herd-Auth has version {version}; this program speaks version 1.", 426)
        raise AuthError("X-Herd-Auth is malformed.")
    key_id, sender, receiver, seq, body_sha256, mac = found.groups()
    number = int(seq)
    if number > MAX_SEQ or not is_node_id(key_id.partition("/")[0]):
        raise AuthError("X-Herd-Auth is malformed.")
    return AuthHeader(key_id, sender, None if receiver == _NOBODY else receiver, number, body_sha256, mac)


class Signer:
    """Signs and checks heads that differ in number and body only, for one key.

    The keyed and the constant part are hashed once: what is left of a mac is a line of text. HMAC-SHA256
    after RFC 2104; a test holds it equal to `hmac`'s.
    """

    __slots__ = ("_constant", "_inner", "_outer")

    def __init__(
        self,
        key: bytes,
        *,
        direction: Direction,
        method: str,
        target: str,
        key_id: str,
        sender_boot: str,
        receiver_boot: str | None,
    ) -> None:
        block = (key if len(key) <= _BLOCK_BYTES else hashlib.sha256(key).digest()).ljust(_BLOCK_BYTES, b"\0")
        receiver = receiver_boot or _NOBODY
        # No element can hold a line feed: HTTP has none in a method or target, and the rest is checked by
        # form. So two different heads never give the same text.
        text = f"{_SCHEME}\n{direction}\n{method}\n{target}\n{key_id}\n{sender_boot}\n{receiver}\n"
        self._constant = f"1 {key_id} {sender_boot} {receiver} "
        self._inner = hashlib.sha256(block.translate(_INNER_PAD) + text.encode("utf-8", "surrogatepass"))
        self._outer = hashlib.sha256(block.translate(_OUTER_PAD))

    def sign(self, seq: int, body_sha256: str) -> str:
        """The value of X-Herd-Auth."""
        return f"{self._constant}{seq} {body_sha256} {self.mac(seq, body_sha256)}"

    def mac(self, seq: int, body_sha256: str) -> str:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(f"{seq}\n{body_sha256}".encode())
        outer.update(inner.digest())
        return outer.hexdigest()


def sign(
    key: bytes,
    *,
    direction: Direction,
    method: str,
    target: str,
    key_id: str,
    sender_boot: str,
    receiver_boot: str | None,
    seq: int,
    body_sha256: str,
) -> str:
    """The value of X-Herd-Auth. `target` is path and query as sent, `receiver_boot` None while not known."""
    signer = Signer(
        key,
        direction=direction,
        method=method,
        target=target,
        key_id=key_id,
        sender_boot=sender_boot,
        receiver_boot=receiver_boot,
    )
    return signer.sign(seq, body_sha256)


def mac_ok(key: bytes, header: AuthHeader, *, direction: Direction, method: str, target: str) -> bool:
    """True if whoever has `key` signed exactly this head. The body's hash is checked when it came."""
    signer = _verifier(key, header, direction, method, target)
    return hmac.compare_digest(signer.mac(header.seq, header.body_sha256), header.mac)


def _verifier(key: bytes, header: AuthHeader, direction: Direction, method: str, target: str) -> Signer:
    return Signer(
        key,
        direction=direction,
        method=method,
        target=target,
        key_id=header.key_id,
        sender_boot=header.sender_boot,
        receiver_boot=header.receiver_boot,
    )


class CallHeads:
    """Reads the heads of calls, with a memory: one router writes the same front of its heads all day.

    What stands in front of the number is kept together with what it says, so of the next head only number,
    hash and mac are looked at. Only what was signed well is remembered, so a stranger cannot fill it.
    """

    _MOST = 256

    def __init__(self, key_for: Callable[[str], bytes | None]) -> None:
        self._key_for = key_for
        self._known: dict[tuple[str, str, str], tuple[str, str, str | None, bytes, Signer]] = {}

    def read(self, value: str, method: str, target: str) -> tuple[AuthHeader, bytes] | None:
        """The head and the key that signed it; None where nobody whose key is known did. Raises AuthError."""
        front, *rest = value.rsplit(" ", 3)
        known = self._known.get((method, target, front))
        if known is not None and len(rest) == 3 and value.isascii():
            key_id, sender, receiver, key, signer = known
            seq, body_sha256, mac = rest
            # Any other way to write the number is judged by `parse_auth`; what was signed so has its form.
            plain = seq.isdecimal() and seq[0] != "0" and len(seq) < _MAX_SEQ_DIGITS
            if plain and self._key_for(key_id) == key:
                header = AuthHeader(key_id, sender, receiver, int(seq), body_sha256, mac)
                if hmac.compare_digest(signer.mac(header.seq, body_sha256), mac):
                    return header, key
        return self._read_anew(value, method, target, front)

    def _read_anew(self, value: str, method: str, target: str, front: str) -> tuple[AuthHeader, bytes] | None:
        header = parse_auth(value)
        key = self._key_for(header.key_id)
        if key is None:
            return None
        signer = _verifier(key, header, "call", method, target)
        if not hmac.compare_digest(signer.mac(header.seq, header.body_sha256), header.mac):
            return None
        if len(self._known) >= self._MOST:
            self._known.clear()
        said = header.key_id, header.sender_boot, header.receiver_boot
        self._known[method, target, front] = *said, key, signer
        return header, key


#: Copied for each body: OpenSSL looks up which of its implementations to use each time one is made.
_NO_BODY = hashlib.sha256()


def body_hash(body: Body) -> str:
    digest = _NO_BODY.copy()
    digest.update(body)
    return digest.hexdigest()


EMPTY_BODY_HASH = body_hash(b"")


def node_key(join_secret: bytes, key_id: str) -> bytes:
    """The key of one agent, derived from the join secret (v1)."""
    return hmac.digest(join_secret, f"node\n{key_id}".encode(), "sha256")


def key_id(node_id: str, agent_id: str) -> str:
    return f"{node_id}/{agent_id}"


def split_key_id(key_id: str) -> tuple[str, str]:
    """(node id, agent id)."""
    node_id, _, agent_id = key_id.partition("/")
    return node_id, agent_id


class SeqWindow:
    """Each sequence number once, in any order, as long as it is at most `size` below the highest seen."""

    __slots__ = ("_highest", "_last_at", "_size")

    def __init__(self, size: int = 8192) -> None:
        self._size = size
        self._highest = 0
        # Numbers of the same place are further apart than the window is wide, so the last one is enough.
        self._last_at = array("q", bytes(8 * (size + 1)))

    def accept(self, seq: int) -> bool:
        place = seq % len(self._last_at)
        if seq < 1 or seq < self._highest - self._size or self._last_at[place] == seq:
            return False
        self._last_at[place] = seq
        if seq > self._highest:
            self._highest = seq
        return True


class _Boots:
    """One sender's boots in the order in which they were first seen, and the one that counts now."""

    __slots__ = ("_order", "current")

    #: A sender that restarts every 5 s needs 90 hours to get here; the oldest boot is forgotten then.
    _MOST = 65_536

    def __init__(self) -> None:
        self._order: dict[str, int] = {}
        self.current: str | None = None

    def see(self, boot: str) -> None:
        if boot in self._order:
            return
        if len(self._order) >= self._MOST:
            del self._order[next(known for known in self._order if known != self.current)]
        last = next(reversed(self._order.values()), 0)
        self._order[boot] = last + 1

    def is_replaced(self, boot: str) -> bool:
        """True for a boot first seen before the current one, whether or not it ever was the current one."""
        order = self._order.get(boot)
        return order is not None and self.current is not None and order < self._order[self.current]

    def move_to(self, boot: str) -> None:
        self.see(boot)
        self.current = boot


class _Sender:
    """What the router keeps of one agent's beats."""

    __slots__ = ("boots", "last_seq")

    def __init__(self) -> None:
        self.boots = _Boots()
        self.last_seq = 0


class BeatGate:
    """The router's side of beats: within a boot strictly rising, and a replaced boot never comes back."""

    def __init__(self, router_boot: str) -> None:
        self.router_boot = router_boot
        self._senders: dict[str, _Sender] = {}

    def check(self, header: AuthHeader) -> Refusal | None:
        """What speaks against a beat whose mac is good.

        Remembers no more than when the boot was first seen. An agent must ask, and be told our boot by a 401,
        before it can sign a beat for us; so even a process whose beat was held up on the way, and which never
        got one accepted, is known to be the older one when its successor has been heard.
        """
        sender = self._senders.setdefault(header.key_id, _Sender())
        sender.boots.see(header.sender_boot)
        # 1. it must be meant for this very process
        if header.receiver_boot != self.router_boot:
            return Refusal(401, "The beat names another boot of the router.", self.router_boot)
        # 2. a newer boot starts afresh, an older one is over
        if sender.boots.is_replaced(header.sender_boot):
            return Refusal(409, "The beat is from a boot of the agent that a newer one has replaced.")
        # 3. the same boot must count upwards
        if header.sender_boot == sender.boots.current and header.seq <= sender.last_seq:
            return Refusal(409, "The beat is not newer than the last one.")
        return None

    def accept(self, header: AuthHeader) -> None:
        """Record a beat that passed `check` and whose body was found good."""
        sender = self._senders.setdefault(header.key_id, _Sender())
        sender.boots.move_to(header.sender_boot)
        sender.last_seq = header.seq

    def boot_of(self, key_id: str) -> str | None:
        """The boot that the agent's last accepted beat came from."""
        sender = self._senders.get(key_id)
        return None if sender is None else sender.boots.current


class _Caller:
    """What the agent keeps of one router's calls."""

    __slots__ = ("boots", "window")

    def __init__(self) -> None:
        self.boots = _Boots()
        self.window = SeqWindow()


class CallGate:
    """The agent's side of calls: only the boot in the router's last signed reply, each number once.

    One gate a router: an agent has the same key id with each of them.
    """

    def __init__(self, agent_boot: str) -> None:
        self.agent_boot = agent_boot
        self._callers: dict[str, _Caller] = {}

    def learn_router_boot(self, key_id: str, boot: str) -> None:
        """A signed reply named this boot. One that was replaced earlier stays replaced."""
        caller = self._callers.setdefault(key_id, _Caller())
        if boot != caller.boots.current and not caller.boots.is_replaced(boot):
            caller.boots.move_to(boot)
            caller.window = SeqWindow()

    def check_and_accept(self, header: AuthHeader) -> Refusal | None:
        """What speaks against a call whose mac is good; None accepts it and uses its number up."""
        # 1. it must be meant for this very process
        if header.receiver_boot != self.agent_boot:
            return Refusal(401, "The call names another boot of the agent.", self.agent_boot)
        # 2. it must come from the router process that answered the last beat
        caller = self._callers.get(header.key_id)
        if caller is None:
            return Refusal(401, "No router has answered a beat of this agent yet.")
        if header.sender_boot != caller.boots.current:
            if caller.boots.is_replaced(header.sender_boot):
                return Refusal(409, "The call is from a boot of the router that a newer one has replaced.")
            return Refusal(401, "The call is from a boot of the router that has not answered a beat.")
        # 3. each number once
        if not caller.window.accept(header.seq):
            return Refusal(409, "The call's number was used before, or is far behind.")
        return None


_TOKEN_PREFIX = "herd1_"
_TOKEN_FORM = re.compile(r"[A-Za-z0-9_-]+")
_MAX_TOKEN_CHARS = 4096
_MAX_URLS = 16
_MAX_URL_CHARS = 256
_SECRET_BYTES = 32
_ROUTER_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: All that such a URL needs, and nothing that a terminal or a log line would trip over.
_URL_CHARACTERS = re.compile(r"[A-Za-z0-9._~:/\[\]-]+")


class TokenError(ValueError):
    """The token cannot be used; `str()` is one sentence that never repeats the token."""


class Token(NamedTuple):
    """All that an agent needs to join: which router, where it may be, and the secret both will share."""

    router_id: str
    urls: tuple[str, ...]
    secret: bytes

    def __repr__(self) -> str:
        return f"Token(router_id={self.router_id!r}, urls={self.urls!r}, secret=…)"


def render_token(token: Token) -> str:
    """One word without dots and padding: `herd1_` and base64url of the JSON."""
    fields = {"r": token.router_id, "u": list(token.urls), "s": _to_base64url(token.secret)}
    return _TOKEN_PREFIX + _to_base64url(json.dumps(fields, separators=(",", ":")).encode())


def parse_token(text: str) -> Token:
    """The reverse of `render_token`; white space around it is forgiven. Raises TokenError."""
    word = text.strip()
    if not word:
        raise TokenError("The join token is empty.")
    if not word.startswith(_TOKEN_PREFIX):
        raise TokenError("This is no join token: it must begin with herd1_, as `herd join` shows it.")
    if len(word) > _MAX_TOKEN_CHARS or not _TOKEN_FORM.fullmatch(word):
        raise TokenError(
            "The join token must be one word of letters, digits, - and _, as `herd join` shows it."
        )
    try:
        fields = json.loads(_from_base64url(word.removeprefix(_TOKEN_PREFIX)))
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise TokenError("The join token is damaged or cut short; copy the whole word again.")
    return Token(_router_id(fields.get("r")), _urls(fields.get("u")), _secret(fields.get("s")))


def _router_id(value: object) -> str:
    if not isinstance(value, str) or not _ROUTER_ID.fullmatch(value):
        raise TokenError("The join token names no router; copy the whole word again.")
    return value


def _urls(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_URLS or not all(map(_is_router_url, value)):
        raise TokenError("The join token holds no usable address of a router; copy the whole word again.")
    return tuple(value)


def _is_router_url(value: object) -> bool:
    """`http://host:port` and no more: no credentials, path or query to be sent anywhere."""
    if not isinstance(value, str) or len(value) > _MAX_URL_CHARS or not _URL_CHARACTERS.fullmatch(value):
        return False
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return False
    return parts.path in ("", "/") and port != 0


def _secret(value: object) -> bytes:
    try:
        secret = _from_base64url(value) if isinstance(value, str) else b""
    except ValueError:
        secret = b""
    if len(secret) != _SECRET_BYTES:
        raise TokenError("The join token holds no usable secret; copy the whole word again.")
    return secret


def _to_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _from_base64url(text: str) -> bytes:
    if not _TOKEN_FORM.fullmatch(text):
        raise binascii.Error("not base64url")
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
