"""The composition root of the agent: builds everything once, owns every lifetime, ends in order.

Loops, each supervised and each on its own, so that a server that hangs delays no heartbeat: one a backend
(poll), one for the sensors, one for beats, one for mDNS. They meet in values only: a beat is made of whatever
the others read last. A change (backend up or down, model loaded or gone, drain) wakes the beat at once.

The end: the first signal drains (beats say so, new calls are refused, what runs may finish), the second ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from herd_node.backends import small_model
from herd_node.backends.base import Backend, Means, Owner
from herd_node.backends.calls import control_client as backend_client
from herd_node.backends.detect import DEFAULT_URLS, Watched
from herd_node.backends.embedded import EmbeddedConfig, EmbeddedServer
from herd_node.backends.processes import PortOwners
from herd_node.backends.warm import WarmMemory
from herd_node.discovery import RouterFinder
from herd_node.gateway import MAX_BODY_BYTES, Calls, Gateway
from herd_node.membership import Membership
from herd_node.models.downloads import Downloads
from herd_node.models.folder import ModelsFolder
from herd_node.models.manager import in_order
from herd_node.models.outward import Outward
from herd_node.net.asgi import asgi_endpoint
from herd_node.net.lane import lane_protocol
from herd_node.net.outbox import Outbox
from herd_node.net.pool import Origin
from herd_node.net.server import QuietServer, port_of
from herd_node.protocol.auth import CallGate
from herd_node.protocol.routes import FORWARDED_BY_PATH
from herd_node.protocol.wire import Heartbeat
from herd_node.relay import Relay
from herd_node.report import BackendState, Host, Self, heartbeat, standing
from herd_node.router_client import KeyRing, Link, RouterClient, control_client
from herd_node.runtime.addresses import own_addresses
from herd_node.runtime.chance import new_hex
from herd_node.runtime.clock import Clock
from herd_node.runtime.paths import DataDir, read_private, write_private
from herd_node.runtime.tasks import Tasks, supervise
from herd_node.sensors import Sensors
from herd_node.settings import Settings, Surroundings

_log = logging.getLogger(__name__)

#: What may be kept in memory as a whole; the rest is not for the lane.
_PLAIN_PATHS = [path for path, route in FORWARDED_BY_PATH.items() if route.body == "whole"]

#: A llama-server must not be asked for its slots more often (docs/backends.md).
LEAST_POLL_GAP_S = 1.0
LEAST_LOOK_GAP_S = 0.2
#: One that is there and not ready yet is looked at more often than every beat.
LOADING_POLL_S = 1.0
_FETCH_AGAIN_S = 30.0
FIRST_BEAT_S = 2.0
_LAST_BEAT_S = 2.0
_GRACEFUL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Everything that was decided before the loop began."""

    settings: Settings
    surroundings: Surroundings
    data_dir: DataDir
    membership: Membership
    sockets: Sequence[socket.socket]
    clock: Clock
    owner_of: Callable[[Origin], Owner | None] = field(default_factory=lambda: PortOwners().owner_of)
    """Sees the process behind a local port."""


async def run(start: Start) -> None:
    """The agent's whole life: until a signal ends it."""
    agent = Agent(start)
    try:
        await agent.serve()
    finally:
        await agent.close()


class Watch:
    """One backend and its poll loop."""

    def __init__(self, backend: Backend, clock: Clock, interval_s: float, *, named: bool) -> None:
        self.backend = backend
        self.named = named
        """The user asked for it, so it is reported also while nothing answers there."""
        self._clock = clock
        self._interval_s = interval_s
        self._wake = asyncio.Event()
        self._slots_taken: int | None = None
        self.asked = asyncio.Event()
        """It was polled once: what it says is not a guess any more."""

    def wake(self) -> None:
        self._wake.set()

    async def run(self, seen: Callable[[Watch], None], calls: Calls) -> None:
        """Poll for ever; `seen` hears of each reading."""
        while True:
            self._wake.clear()
            began_s = self._clock.now_s()
            reading = await self.backend.poll(began_s)
            await self._count_slots(calls)
            self.asked.set()
            seen(self)
            waits_for_it = (not reading.ready and reading.kind is not None) or bool(self._slots_taken)
            try:
                async with asyncio.timeout(LOADING_POLL_S if waits_for_it else self._interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            least_s = LEAST_POLL_GAP_S if reading.ready else LEAST_LOOK_GAP_S
            gap_s = began_s + least_s - self._clock.now_s()
            if gap_s > 0:
                await self._clock.sleep(gap_s)

    async def _count_slots(self, calls: Calls) -> None:
        """By the server's own word, while it may be at work: asked when idle, a sleeping one would wake."""
        ask = self._slots_taken or calls.ran_lately(self.backend.id)
        self._slots_taken = await self.backend.slots_taken() if ask else None

    def state(self) -> BackendState | None:
        """What beats say of it; None for a default address where nothing has ever answered."""
        reading = self.backend.reading
        if reading.kind is None and not self.named:
            return None
        taken, models = self._slots_taken, reading.models
        if taken is not None:
            models = tuple(
                replace(model, slots_taken=taken) if model.state == "hot" else model for model in models
            )
        return BackendState(
            id=self.backend.id,
            kind=reading.kind,
            version=reading.version,
            ready=reading.ready,
            reason=reading.reason,
            max_loaded=reading.max_loaded,
            models=models,
            endpoints=reading.endpoints,
            manages=in_order(self.backend.manager.offers),
            disk_free_bytes=self.backend.manager.free_bytes,
        )


class Agent:
    """One agent process."""

    def __init__(self, start: Start) -> None:
        settings, clock = start.settings, start.clock
        self._start = start
        self._tasks = Tasks("herd-node")
        self._node_dir = start.data_dir.node(start.membership.node_id)
        self._sensors = Sensors(_model_folder(start))
        self._host = _read_host(self._sensors)
        self._addresses = _addresses(settings)
        self._warm = WarmMemory.parse(_read(self._node_dir.warm_file))
        self._backend_http = backend_client()
        self._router_http = control_client()
        self._downloads = _downloads(start, self._tasks)
        self.watches = self._make_watches()
        self._standing: object = None
        self._said = ""
        boot = new_hex(8)
        self._me = Self(
            node_id=start.membership.node_id,
            agent_id=start.membership.agent_id,
            boot=boot,
            agent_version=agent_version(),
            interval_s=settings.heartbeat_interval,
            port=port_of(start.sockets),
        )
        gate, keys = CallGate(boot), KeyRing()
        outbox = Outbox()
        self._relay = Relay(clock, self._look_again, outbox)
        self.gateway = Gateway(
            node_id=self._me.node_id,
            agent_id=self._me.agent_id,
            boot=boot,
            gate=gate,
            key_for=keys.key_for,
            backends=lambda: [watch.backend for watch in self.watches],
            relay=self._relay,
            clock=clock,
            tasks=self._tasks,
            on_ping=self._pinged,
            spool_folder=start.data_dir.models,
        )
        self._finder = RouterFinder(self._tasks, clock, self._changed, lambda: self._addresses)
        self.client = RouterClient(
            Link(
                membership=start.membership,
                boot=boot,
                router_url=settings.router_url,
                interval_s=settings.heartbeat_interval,
                http=self._router_http,
                clock=clock,
                gate=gate,
                keys=keys,
                finder=self._finder,
                build=self._beat,
            )
        )
        self._server = QuietServer(
            asgi_endpoint(self.gateway.handle),
            on_stop=self._signalled,
            graceful_s=_GRACEFUL_S,
            hold=True,
            http=lane_protocol(dict.fromkeys(_PLAIN_PATHS, self.gateway.handle), MAX_BODY_BYTES, outbox),
        )

    # -- life ------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Start every loop, serve until a signal has ended the drain."""
        for watch in self.watches:
            self._loop(f"poll {watch.backend.url}", lambda watch=watch: self._poll(watch))  # type: ignore[misc]
        self._loop("sensors", self._read_sensors)
        self._loop("heartbeat", self._beat_for_ever)
        if not self._start.settings.router_url:
            self._loop("mdns", self._finder.run)
        for watch in self.watches:
            if isinstance(watch.backend, EmbeddedServer):
                self._tasks.spawn(self._start_embedded(watch.backend), name="embedded server's model")
        await self._server.serve(list(self._start.sockets))

    async def close(self) -> None:
        """Everything ends here, the children first."""
        for watch in self.watches:
            if isinstance(watch.backend, EmbeddedServer):
                await watch.backend.stop()
        await self._tasks.close()
        await self._relay.close()
        await self._router_http.aclose()
        await self._backend_http.aclose()
        self._keep_warm_memory()

    def _poll(self, watch: Watch) -> Coroutine[Any, Any, None]:
        return watch.run(self._seen, self.gateway.calls)

    def _loop(self, name: str, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.spawn(supervise(make, name=name, clock=self._start.clock), name=name)

    def _signalled(self, count: int) -> None:
        if count == 1:
            self._tasks.spawn(self._drain(), name="drain")
        else:
            _log.info("Ending at once.")

    async def _drain(self) -> None:
        """Say it, refuse what is new, let what runs finish, then stop the server."""
        self.gateway.draining = True
        running = len(self.gateway.calls)
        drain_s = self._start.settings.drain_timeout_s
        if running:
            _log.info(
                "Finishing %d running call(s), at most %.0f s; a second Ctrl-C ends at once.",
                running,
                drain_s,
            )
        await self.client.tell(min(_LAST_BEAT_S, drain_s))
        try:
            async with asyncio.timeout(drain_s):
                await self.gateway.calls.until_idle()
        except TimeoutError:
            _log.warning("%d call(s) did not finish in time and are cut.", len(self.gateway.calls))
            self._server.force()
        self._server.stop()

    # -- what the loops do -----------------------------------------------------------------------------------

    def _beat(self, seq: int) -> Heartbeat:
        return heartbeat(
            self._me,
            seq=seq,
            draining=self.gateway.draining,
            addresses=self._addresses,
            host=self._host,
            backends=self._states(),
            in_flight=self.gateway.calls.by_model(),
        )

    async def _beat_for_ever(self) -> None:
        """The first beat waits a moment for the backends: one without models would say that they are gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_BEAT_S):
                for watch in self.watches:
                    await watch.asked.wait()
        await self.client.run()

    def _states(self) -> list[BackendState]:
        return [state for watch in self.watches if (state := watch.state()) is not None]

    def _changed(self) -> None:
        """The router must hear of something within 250 ms."""
        self.client.changed()

    def _pinged(self) -> None:
        """The router tries whether it can call us: ask soon what came of it."""
        if self.client.state != "online":
            self._changed()

    def _look_again(self) -> None:
        """A backend did something that its last reading does not explain, or began or ended a load."""
        for watch in self.watches:
            watch.wake()
        self._compare()

    def _seen(self, _watch: Watch) -> None:
        self._compare()
        self._keep_warm_memory()

    def _compare(self) -> None:
        states = self._states()
        now = standing(states)
        if now != self._standing:
            self._standing = now
            self._changed()
        if not all(watch.asked.is_set() for watch in self.watches):
            return
        sentence = _about_backends(states)
        if sentence != self._said:
            self._said = sentence
            _log.info("%s", sentence)

    async def _read_sensors(self) -> None:
        while True:
            await self._start.clock.sleep(self._start.settings.heartbeat_interval)
            self._host = await asyncio.to_thread(_read_host, self._sensors)
            addresses = await asyncio.to_thread(_addresses, self._start.settings)
            if addresses != self._addresses:
                self._addresses = addresses
                self._changed()

    async def _start_embedded(self, server: EmbeddedServer) -> None:
        """Fetch the small model if it is not there, however long that takes, then start the child."""
        while self._start.settings.model is None:
            try:
                await small_model.fetch(self._start.data_dir.models, Progress(), clock=self._start.clock)
                break
            except small_model.FetchFailed as error:
                _log.warning(
                    "The small model is not there yet: %s; next try in %.0f s", error, _FETCH_AGAIN_S
                )
                await self._start.clock.sleep(_FETCH_AGAIN_S)
        server.start()

    def _keep_warm_memory(self) -> None:
        if self._warm.changed:
            self._warm.changed = False
            try:
                write_private(self._node_dir.warm_file, self._warm.dump().encode())
            except OSError as error:  # a hint for after a restart, no more
                _log.debug("what was loaded lately cannot be written down: %s", error)

    def _make_watches(self) -> list[Watch]:
        """The user's backends in their order, else the usual addresses; then the embedded one."""
        settings, surroundings, clock = self._start.settings, self._start.surroundings, self._start.clock
        means = Means(
            http=self._backend_http,
            clock=clock,
            tasks=self._tasks,
            slots=settings.slots,
            num_parallel=surroundings.num_parallel,
            max_loaded=surroundings.max_loaded,
            gpu_count=len(self._host.gpus),
            owner_of=self._start.owner_of,
            warm=self._warm,
            on_change=self._look_again,
            downloads=self._downloads,
            until_unused=lambda backend, model: self.gateway.calls.until_unused((backend, model)),
        )
        interval_s = settings.heartbeat_interval
        urls = settings.backend or DEFAULT_URLS
        named = bool(settings.backend)
        watches = [Watch(Watched(url, means), clock, interval_s, named=named) for url in urls]
        if settings.embedded:
            config = EmbeddedConfig(
                model_file=settings.model or small_model.model_file(self._start.data_dir.models),
                log_file=self._start.data_dir.logs / f"llama-server-{self._start.membership.node_id}.log",
                threads=settings.embedded_threads,
                slots=settings.slots or 2,
            )
            watches.append(Watch(EmbeddedServer(config, means), clock, interval_s, named=True))
        return watches


class Progress:
    """Says what is fetched, once a stage and every tenth of it."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, stage: str, done: int, total: int) -> None:
        tenth = done * 10 // total if total else 0
        if (stage, tenth) == self._last:
            return
        self._last = (stage, tenth)
        if total:
            _log.info("Small model: %s, %d %% of %.0f MB", stage, tenth * 10, total / 1e6)
        else:
            _log.info("Small model: %s", stage)


def agent_version() -> str:
    try:
        return version("herd-fleet")
    except PackageNotFoundError:
        return "unknown"


def _about_backends(states: Sequence[BackendState]) -> str:
    """One sentence for the console: what answers, or what is waited for."""
    if not states:
        places = " or ".join(url.removeprefix("http://") for url in DEFAULT_URLS)
        return f"Waiting for a backend: neither Ollama nor llama-server answers at {places}."
    words = []
    for state in states:
        if state.ready:
            number = len(state.models)
            words.append(f"{state.id} is ready with {number} model{'' if number == 1 else 's'}")
        else:
            words.append(f"{state.id} is not ready: {state.reason or 'no reason given'}")
    return "Backends: " + "; ".join(words)


def _addresses(settings: Settings) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*own_addresses(), *settings.address)))


def _read_host(sensors: Sensors) -> Host:
    """Blocks some milliseconds."""
    reading = sensors.read()
    return Host(
        hardware=reading.hardware,
        cpu=reading.cpu,
        memory=reading.memory,
        disk=reading.disk,
        heat=reading.heat,
        power=reading.power,
        gpus=reading.gpus,
    )


def _model_folder(start: Start) -> Path:
    """Where models take disk space: Ollama's folder if there is one, else our own."""
    ollama = start.surroundings.models or Path.home() / ".ollama" / "models"
    return ollama if ollama.is_dir() else start.settings.models_dir or start.data_dir.models


def _downloads(start: Start, tasks: Tasks) -> Downloads:
    """Connects nowhere until a call asks for a pull."""
    named, around = start.settings.models_dir, start.surroundings
    folder = ModelsFolder((named or start.data_dir.models).absolute(), named=named is not None)
    outward = Outward(around.proxy, agent=f"herd-node/{agent_version()}")
    return Downloads(folder, outward, tasks, start.clock, hub=around.hub)


def _read(path: Path) -> bytes | None:
    try:
        return read_private(path)
    except OSError:
        return None
