"""The beat loop towards one router: find it, sign, send, believe only what it signs, say what is wrong once.

It knows nothing of backends: `build` makes each beat. What a signed reply teaches (the router's boot and the
key it answers with) goes into the call gate and the key ring, so the gateway admits exactly this router.

One try (docs/protocol.md §2, §5):
1. no credential: say what to do, wait
2. for each address (`--router-url`, known ones, then mDNS): send one signed beat
3. 401 with a boot: sign again at once with it, once
4. 200 with a good signature of the expected router: accepted, remember it
5. anything else: say so once; the next credential, then the next try in an interval
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import httpx
import orjson

from herd_node.membership import Credential, Membership
from herd_node.protocol import auth, wire
from herd_node.report import shortened
from herd_node.runtime.clock import Clock

TARGET = "/heartbeat"
LEAST_GAP_S = 0.2
_HOW_TO_JOIN = (
    "No router is known yet: run `herd join` on the router's machine, then `herd-node --join -` on this one."
)
#: A router's reason for a node that it has not called yet: every node begins so, and nothing is wrong.
NOT_CALLED_YET = "not probed yet"
RETRY_S = 5.0
_MAX_REPLY_BYTES = 64 * 1024
_ANSWER_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


class Finder(Protocol):
    """Where a router whose id is known may be (mDNS)."""

    def urls_of(self, router_id: str) -> tuple[str, ...]: ...


class KeyRing:
    """The keys by which calls are checked. In v1 one router, so one key for the node's own key id."""

    def __init__(self) -> None:
        self._keys: dict[str, bytes] = {}

    def learn(self, key_id: str, key: bytes) -> None:
        self._keys[key_id] = key

    def key_for(self, key_id: str) -> bytes | None:
        return self._keys.get(key_id)


class Accepted(NamedTuple):
    url: str
    reply: wire.BeatReply


class Unreached(NamedTuple):
    """Nobody answered there, or nothing that is our router."""

    url: str
    why: str


class Refused(NamedTuple):
    """A router answered and did not take the beat."""

    url: str
    status: int
    why: str


Outcome = Accepted | Unreached | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a beat loop is made of."""

    membership: Membership
    boot: str
    router_url: str
    interval_s: float
    http: httpx.AsyncClient
    clock: Clock
    gate: auth.CallGate
    keys: KeyRing
    finder: Finder
    build: Callable[[int], wire.Heartbeat]
    """The beat with this sequence number."""


class RouterClient:
    """One beat loop. `changed` asks for a beat at once."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._changed = asyncio.Event()
        self._seq = 0
        self._router_boot: str | None = None
        self._refused: set[tuple[str, bytes]] = set()
        self._good_url = ""
        self._silent: set[str] = set()
        """Addresses where nobody answered in the last try: the others come first."""
        self._said = ""
        self._last_sent_s = float("-inf")
        self._trying = False
        self._tries = 0
        self._tried = asyncio.Condition()
        self.beats_accepted = 0
        self.state: str | None = None

    def changed(self) -> None:
        """Something happened that the router must hear of within 250 ms."""
        self._changed.set()

    async def tell(self, timeout_s: float) -> None:
        """Have the router hear of a change now; returns after the try, or when the time is up."""
        if self.beats_accepted == 0:
            return
        tries = (
            self._tries + 1 + self._trying
        )  # a beat that is on its way may have been built before the change
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._tried:
                await self._tried.wait_for(lambda: self._tries >= tries)

    async def run(self) -> None:
        """Beat for ever."""
        interval_s = self._link.interval_s
        while True:
            self._trying = True
            outcome = await self.beat()
            self._trying = False
            self._tries += 1
            async with self._tried:
                self._tried.notify_all()
            if isinstance(outcome, Accepted):
                interval_s = outcome.reply.interval_s or self._link.interval_s
            await self._pause(interval_s if isinstance(outcome, Accepted) else min(interval_s, RETRY_S))

    async def beat(self) -> Outcome | None:
        """One try. None when there is no credential to try with."""
        self._changed.clear()
        candidates = self._link.membership.candidates()
        if not candidates:
            self._say(_HOW_TO_JOIN)
            return None
        # 1. a credential that was refused waits until the others were; then all are tried anew
        fresh = [one for one in candidates if (one.source, one.key) not in self._refused]
        if not fresh:
            self._refused.clear()
        credential = (fresh or candidates)[0]
        # 2. each address, the one that worked last first
        outcome: Outcome | None = None
        for url in self._urls(credential, candidates):
            outcome = await self._try(url, credential)
            if not isinstance(outcome, Unreached):
                self._silent.clear()
                break
            self._silent.add(url)
        if outcome is None:
            self._say(f"Looking for the router {credential.router_id or ''} on the local network (mDNS).")
            return None
        self._conclude(outcome, credential)
        return outcome

    def _urls(self, credential: Credential, candidates: Sequence[Credential]) -> tuple[str, ...]:
        """Where to try, the address that worked last first, those that were silent last."""
        if self._link.router_url:
            return (self._link.router_url,)
        same = [one for one in candidates if one.router_id == credential.router_id is not None]
        found = self._link.finder.urls_of(credential.router_id) if credential.router_id else ()
        known = (*credential.urls, *(url for one in same for url in one.urls), *found)
        first = (self._good_url,) if self._good_url in known else ()
        self._silent.intersection_update(known)
        return tuple(sorted(dict.fromkeys((*first, *known)), key=self._silent.__contains__))

    async def _try(self, url: str, credential: Credential) -> Outcome:
        outcome = await self._send(url, credential)
        if isinstance(outcome, str):  # 401: it has another boot than the one we named
            self._router_boot = outcome
            outcome = await self._send(url, credential)
            if isinstance(outcome, str):
                return Unreached(url, "it names a new boot with every answer")
        return outcome

    async def _send(self, url: str, credential: Credential) -> Outcome | str:
        """Sign and send one beat; the boot, when the answer is a 401 that names one."""
        link = self._link
        self._seq += 1
        seq = self._seq
        body = _encode(link.build(seq))
        signature = auth.sign(
            credential.key,
            direction="beat",
            method="POST",
            target=TARGET,
            key_id=link.membership.key_id,
            sender_boot=link.boot,
            receiver_boot=self._router_boot,
            seq=seq,
            body_sha256=auth.body_hash(body),
        )
        self._last_sent_s = link.clock.now_s()
        try:
            answer = await _post(link.http, url.rstrip("/") + TARGET, body, signature)
        except _NoAnswer as silence:
            return Unreached(url, str(silence))
        if answer.status == 200:
            return self._believed(url, answer, credential, seq)
        said = _fields(answer.body)
        boot = said.get("boot")
        if answer.status == 401 and auth.is_boot(boot):
            return str(boot)
        if answer.status in (400, 401, 409, 413, 426):
            return Refused(url, answer.status, _reason(said) or f"status {answer.status}")
        return Unreached(url, f"it answers with status {answer.status}")

    def _believed(self, url: str, answer: _Answer, credential: Credential, seq: int) -> Accepted | Unreached:
        """A 200 counts only if our router signed it, for this very beat."""
        link = self._link
        try:
            header = auth.parse_auth(answer.signature)
            signed = auth.mac_ok(credential.key, header, direction="reply", method="POST", target=TARGET)
            ours = (header.key_id, header.receiver_boot, header.seq) == (
                link.membership.key_id,
                link.boot,
                seq,
            )
            if not signed or not ours or header.body_sha256 != auth.body_hash(answer.body):
                return Unreached(url, "its answer is not signed by our router")
            reply = wire.parse_reply(_fields(answer.body))
        except ValueError:  # AuthError and WireError: unsigned, or not what protocol.md describes
            return Unreached(url, "its answer is not one of our router")
        if reply.boot != header.sender_boot:
            return Unreached(url, "its answer contradicts its own signature")
        if credential.router_id is not None and reply.router_id != credential.router_id:
            return Unreached(url, f"that is router {reply.router_id}, we belong to {credential.router_id}")
        return Accepted(url, reply)

    def _conclude(self, outcome: Outcome, credential: Credential) -> None:
        match outcome:
            case Accepted(url, reply):
                self._welcome(url, reply, credential)
            case Refused(url, 401, why):
                self._refused.add((credential.source, credential.key))
                self._say(f"The router at {url} refuses our {_name(credential)}: {why}", logging.WARNING)
            case Refused(url, 409, why):
                self._say(f"The router at {url} does not take this node: {why}", logging.WARNING)
            case Refused(url, status, why):
                sentence = f"The router at {url} does not understand our heartbeat ({status}): {why}"
                self._say(sentence, logging.WARNING)
            case Unreached(url, why):
                self._say(f"Waiting for the router at {url}: {why}.")

    def _welcome(self, url: str, reply: wire.BeatReply, credential: Credential) -> None:
        link = self._link
        self._router_boot = reply.boot
        self._good_url = url
        self._refused.clear()
        link.keys.learn(link.membership.key_id, credential.key)
        link.gate.learn_router_boot(link.membership.key_id, reply.boot)
        try:
            link.membership.accepted(reply.router_id, url, credential)
        except OSError as error:  # a full disk: the membership holds until the next start all the same
            _log.warning("The membership cannot be written down: %s", error)
        self.beats_accepted += 1
        self.state = reply.state
        name = link.membership.node_id
        if reply.state == "online":
            self._say(f"Node {name} is online at the router {url}.")
        elif reply.state == "unreachable" and reply.reason == NOT_CALLED_YET:
            self._say(f"The router at {url} knows node {name} now; waiting for its first call.")
        else:
            reason = (reply.reason or "no reason given").removeprefix(f"{reply.state}: ")
            self._say(f"Node {name} is {reply.state} at the router {url}: {reason}")

    def _say(self, sentence: str, level: int = logging.INFO) -> None:
        """On the console and in the log, once a change."""
        if sentence != self._said:
            self._said = sentence
            _log.log(level, "%s", sentence)

    async def _pause(self, seconds: float) -> None:
        """Until the next beat is due, or a change; 200 ms after the last at least, so that a burst is one."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return
        gap_s = self._last_sent_s + LEAST_GAP_S - self._link.clock.now_s()
        if gap_s > 0:
            await self._link.clock.sleep(gap_s)


def control_client() -> httpx.AsyncClient:
    """The client for beats: no proxy, no redirect, short. No connection is kept: after a change of address,
    here or there, one leads nowhere and says so late."""
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=8, max_keepalive_connections=0),
    )


class _NoAnswer(Exception):
    """Why there is no answer, for people."""


class _Answer(NamedTuple):
    status: int
    signature: str
    body: bytes


async def _post(http: httpx.AsyncClient, url: str, body: bytes, signature: str) -> _Answer:
    """Raises _NoAnswer; never reads more than a reply can be, never waits longer than its time."""
    headers = {"content-type": "application/json", "x-herd-auth": signature}
    try:
        async with (
            asyncio.timeout(_ANSWER_TIMEOUT_S),
            http.stream("POST", url, content=body, headers=headers) as response,
        ):
            received = bytearray()
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > _MAX_REPLY_BYTES:
                    raise _NoAnswer("its answer is far too large")
            return _Answer(response.status_code, response.headers.get("x-herd-auth", ""), bytes(received))
    except httpx.HTTPError as error:
        raise _NoAnswer(_cause(error)) from error
    except (TimeoutError, httpx.InvalidURL) as error:
        raise _NoAnswer(str(error) or "it does not answer in time") from error


def _encode(beat: wire.Heartbeat) -> bytes:
    body = orjson.dumps(wire.render_heartbeat(beat))
    while len(body) > wire.MAX_BEAT_BYTES and beat.models:
        beat = shortened(beat)
        body = orjson.dumps(wire.render_heartbeat(beat))
    return body


def _fields(body: bytes) -> dict[str, object]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _reason(said: dict[str, object]) -> str | None:
    """The sentence in `{"error": "…"}`, `{"error": {"message": "…"}}` or `{"reason": "…"}`."""
    error = said.get("error") or said.get("reason")
    if isinstance(error, dict):
        error = error.get("message")
    return error[:300] if isinstance(error, str) else None


def _cause(error: httpx.HTTPError) -> str:
    match error:
        case httpx.ConnectTimeout():
            return "no answer within 2 s"
        case httpx.ConnectError():
            return "nothing answers there"
        case httpx.TimeoutException():
            return "it does not answer in time"
    return f"the connection broke ({type(error).__name__})"


def _name(credential: Credential) -> str:
    match credential.source:
        case "token":
            return "token"
        case "agent.json":
            return "stored key"
    return "join secret"
