"""llama.cpp's server as a child of the agent: started, watched, started again; one more backend to the rest.

Its child has one model; another of the models folder is loaded by another child in its place.

The child is `embedded_server`; it ends by itself when the pipe that this process holds closes. Each start
has a new random port and a new random key, so `origin` and `headers` change and are read for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from herd_node.backends import small_model
from herd_node.backends.base import OPENAI_ONLY, Facts, LoadFailed, Means, Reading, base_url, origin_of
from herd_node.backends.calls import Headers
from herd_node.backends.embedded_server import LARGE_BATCH_TOKENS, NO_ENGINE, SMALL_BATCH_TOKENS
from herd_node.backends.llamacpp import LlamaCpp, file_stem
from herd_node.backends.polled import facts_of, index
from herd_node.models.folder import GgufFile
from herd_node.models.folder_manager import FolderManager
from herd_node.models.manager import Refused
from herd_node.net.pool import Origin
from herd_node.protocol.names import canonical
from herd_node.protocol.wire import BackendKind, Model, ModelState
from herd_node.runtime.chance import new_hex

log = logging.getLogger(__name__)

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
STOP_WAIT_S = 2.0
LOOK_INTERVAL_S = 0.25
MAX_LOG_BYTES = 8 * 1024 * 1024
MISSING_ENGINE = "the embedded server needs its engine: pip install 'herd-fleet[embedded]'"

_GIB = 1024**3
_SIGNAL_WORDS = {
    "SIGILL": "illegal instruction",
    "SIGABRT": "aborted",
    "SIGBUS": "bus error",
    "SIGKILL": "killed, perhaps for want of memory",
    "SIGSEGV": "segmentation fault",
    "SIGTERM": "terminated",
}
#: Windows has no signals; a crash is its exit status.
_WINDOWS_CRASHES = {
    0xC000001D: "illegal instruction",
    0xC0000005: "access violation",
    0xC0000135: "missing DLL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedConfig:
    """`context_tokens` is that of one slot; `threads` None: half of the cores."""

    model_file: Path
    log_file: Path
    threads: int | None = None
    slots: int = 2
    context_tokens: int = 4096

    @property
    def name(self) -> str:
        return model_name(self.model_file)


def model_name(file: Path) -> str:
    """The small model has its usual name, any other file is called by its stem."""
    return small_model.MODEL_NAME if file.name == small_model.FILE_NAME else file_stem(file.name)


def half_of_the_cores() -> int:
    """Of those that this process may use; at least one. More would spin against everything else that runs."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // 2)


def batch_tokens(model_bytes: int, available_bytes: int) -> int:
    """The longest embedding input. The large one costs up to 1.2 GB with a big vocabulary, so: given room."""
    return LARGE_BATCH_TOKENS if available_bytes >= 4 * _GIB + 2 * model_bytes else SMALL_BATCH_TOKENS


def missing_engine() -> str | None:
    """A sentence when xllamacpp is not installed."""
    return None if importlib.util.find_spec("xllamacpp") else MISSING_ENGINE


class EmbeddedServer:
    """A `Backend`; `start` it once, `stop` it before the loop ends.

    It serves one file at a time: the one it was made with, until a call is for another of the models folder.
    Then it waits until nothing runs on the old one, and starts its child anew.
    """

    id = "embedded"
    native = OPENAI_ONLY

    def __init__(self, config: EmbeddedConfig, means: Means) -> None:
        self.config = config
        self.manager = FolderManager(self, means.downloads, lambda: True)
        self.reading = Reading(kind="llama-server", reason="not started yet")
        self._means = means
        self._inner: LlamaCpp | None = None
        self._runner: asyncio.Task[None] | None = None
        self._file: Path | None = config.model_file
        """What is served, or is to be; None: nothing, until a call needs it."""
        self._files = {config.name: GgufFile(config.name, config.model_file, 0, 0.0)}
        self._seen: dict[str, Model] = {}
        """By name, as it was when it was loaded last."""
        self._down = Reading(kind="llama-server", reason="not started yet")
        self._polling = asyncio.Lock()
        self._one_switch = asyncio.Lock()
        self._switches: dict[str, asyncio.Task[LoadFailed | None]] = {}
        self._leaving = False
        """The child is to go, and nothing new may begin on it."""
        self._ended: str | None = None
        self._changed = asyncio.Event()
        self._compose()

    # -- what it is to others

    @property
    def kind(self) -> BackendKind:
        return "llama-server"

    @property
    def origin(self) -> Origin:
        return Origin("127.0.0.1", 0) if self._inner is None else self._inner.origin

    @property
    def url(self) -> str:
        return base_url(self.origin)

    @property
    def headers(self) -> Headers:
        return () if self._inner is None else self._inner.headers

    async def poll(self, now_s: float) -> Reading:
        await asyncio.to_thread(self._look)
        await self._poll_child(now_s)
        self._compose()
        return self.reading

    def model(self, name: str) -> Model | None:
        return self._by_name.get(name) if self._inner is not None or self._loads_on_request else None

    def upstream_model(self, name: str) -> str | None:
        model = self.model(name)
        return None if model is None else model.name

    def facts(self, name: str) -> Facts | None:
        model = self.model(name)
        if model is None:
            return None
        told = self._inner.facts(canonical(model.name)) if self._inner is not None else None
        return facts_of(model, model.name) if told is None else told._replace(name=model.name)

    async def slots_taken(self) -> int | None:
        return None if self._inner is None else await self._inner.slots_taken()

    # -- its life

    def start(self) -> None:
        if self._runner is None:
            self._runner = self._means.tasks.spawn(self._run(), name="embedded server")

    async def stop(self) -> None:
        """The child is gone when this returns."""
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.cancel()
            await asyncio.wait([runner])

    async def _run(self) -> None:
        clock, delay_s = self._means.clock, FIRST_DELAY_S
        while True:
            began_s = clock.now_s()
            reason = await self._one_life()
            log.warning("%s %s", self._name, reason)
            if clock.now_s() - began_s >= MAX_DELAY_S:
                delay_s = FIRST_DELAY_S
            self._go_down(f"{reason}; next try in {delay_s:g} s")
            self._tell_switch(reason)
            await clock.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)

    async def _one_life(self) -> str:
        """Start a child and wait for its end; returns why it ended, as the rest of a sentence."""
        if (missing := missing_engine()) is not None:
            return missing
        self._go_down("loading its model")
        key = new_hex(16)
        try:
            process = await self._spawn()
        except OSError as error:
            return f"could not be started: {error}"
        listened = False
        copying = self._means.tasks.spawn(self._keep_log(process), name="embedded server's log")
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(ConnectionError):  # it ended at once: its status says why
                process.stdin.write(self._configuration(key))
                await process.stdin.drain()
            url = _url_in(await process.stdout.readline())
            if url is not None:
                listened = True
                headers: Headers = ((b"authorization", f"Bearer {key}".encode()),)
                self._inner = LlamaCpp(origin_of(url), self._means, headers=headers, backend=self.id)
                self._inner.reading = replace(self._down, reason="loading its model")
                self._tell_switch(None)
                self._means.on_change()
            status = await process.wait()
        finally:
            self._inner = None
            await _end(process)
            await copying
        return how_it_ended(status, listened=listened, last_line=self._last_log_line())

    async def _spawn(self) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "herd_node.backends.embedded_server",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )

    async def _keep_log(self, process: asyncio.subprocess.Process) -> None:
        """Write down what the child says, without what callers said. Ends with the child."""
        assert process.stderr is not None
        without_prompts = LogFilter()
        with _private_log(self.config.log_file) as log_file:
            while piece := await process.stderr.read(65536):
                os.write(log_file, without_prompts.feed(piece))

    def _configuration(self, key: str) -> bytes:
        config, file = self.config, self._file or self.config.model_file
        available = psutil.virtual_memory().available
        line = {
            "model": str(file),
            "alias": model_name(file),
            "api_key": key,
            "threads": config.threads or half_of_the_cores(),
            "slots": config.slots,
            "context_tokens": config.context_tokens,
            "batch_tokens": batch_tokens(_size(file) or 0, available),
        }
        return json.dumps(line).encode() + b"\n"

    def _last_log_line(self) -> str:
        try:
            lines = self.config.log_file.read_bytes()[-4096:].decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    # -- its models

    @property
    def _name(self) -> str:
        """Of the model that is served, or is to be."""
        return "" if self._file is None else model_name(self._file)

    @property
    def _loads_on_request(self) -> bool:
        """No child, and that is as it should be: the next call gets one."""
        return self._file is None or bool(self._switches)

    def _look(self) -> None:
        """The files that it could serve. Blocks a little."""
        downloads = self._means.downloads
        own = self.config.model_file
        files = {self.config.name: GgufFile(self.config.name, own, _size(own) or 0, 0.0)}
        for file in downloads.folder.files() if downloads is not None else ():
            files.setdefault(model_name(file.path), file._replace(name=model_name(file.path)))
        self._files = files
        self.manager.look()

    async def _poll_child(self, now_s: float) -> Reading | None:
        async with self._polling:
            inner = self._inner
            if inner is None:
                return None
            reading = await inner.poll(now_s)
            if reading.ready and reading.models:
                self._seen[reading.models[0].name] = reading.models[0]
            return reading if self._inner is inner else None  # it may have ended meanwhile

    def _compose(self) -> None:
        """One reading of the child and of what it could serve instead."""
        reading = self._down if self._inner is None else self._inner.reading
        if self._loads_on_request:
            reading = replace(reading, ready=True, reason=None)
        current = next(iter(reading.models), None) if self._inner is not None else None
        models = []
        for name, file in self._files.items():
            if current is not None and name == current.name:
                models.append(replace(current, aliases=(*current.aliases, *file.aliases)))
            else:
                models.append(self._unloaded(name, file))
        self.reading = replace(reading, models=tuple(models), max_loaded=1)
        self._by_name = index(self.reading.models)

    def _unloaded(self, name: str, file: GgufFile) -> Model:
        """What the beats list: the router shall wait for it, not refuse."""
        state: ModelState = "loading" if name == self._name and self._is_starting else "cold"
        known = self._seen.get(name)
        if known is not None:
            return replace(known, state=state, slots_taken=None, aliases=file.aliases)
        return Model(
            name=name,
            aliases=file.aliases,
            backend=self.id,
            state=state,
            capabilities=("completion", "embedding"),
            size_bytes=_size(file.path),
            context_tokens=self.config.context_tokens,
            context_fixed=True,
            slots=self._means.slots or self.config.slots,
            digest=file.sha256,
            modified_s=file.modified_wall_s or None,
        )

    @property
    def _is_starting(self) -> bool:
        return self._inner is None and self._down.reason == "loading its model"

    def _go_down(self, reason: str) -> None:
        self._down = Reading(kind="llama-server", reason=reason)
        self._compose()
        self._means.on_change()

    # -- loading and unloading

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None:
        """The options are its own, so they change nothing."""
        model = self._by_name.get(canonical(name))
        if model is None:
            raise LoadFailed(f"model '{name}' not found", 404)
        if model.name == self._name and self._inner is not None and not self._leaving:
            return
        task = self._switches.get(model.name)
        if task is None:
            task = self._means.tasks.spawn(self._switch(model.name), name=f"load {model.name}")
            self._switches[model.name] = task
        failure = await asyncio.shield(task)
        if failure is not None:
            raise failure

    async def unload(self, name: str) -> None:
        model = self._by_name.get(canonical(name))
        if model is None:
            raise LoadFailed(f"model '{name}' not found", 404)
        async with self._one_switch:
            if model.name == self._name:
                await self._let_go()
                self._file = None
                self._go_down("no model is loaded")

    async def _switch(self, name: str) -> LoadFailed | None:
        """Serve another file. Where that does not work the old one is served again."""
        try:
            async with self._one_switch:
                file, before = self._files.get(name), self._file
                if file is None:
                    return LoadFailed(f"model '{name}' not found", 404)
                if name != self._name:
                    await self._let_go()
                    self._file = file.path
                self.start()
                reason = await self._until_up()
                if reason is None:
                    return None
                if before != file.path:
                    await self.stop()
                    self._file = before
                    if before is not None:
                        self.start()
                return LoadFailed(f"model '{name}' cannot be loaded: its server {reason}")
        finally:
            del self._switches[name]
            self._compose()
            self._means.on_change()

    async def _let_go(self) -> None:
        """End the child, once nothing runs on it."""
        self._leaving = True
        try:
            if self._inner is not None:
                await self._means.until_unused(self.id, canonical(self._name))
            await self.stop()
        finally:
            self._leaving = False

    async def _until_up(self) -> str | None:
        """None when the child is ready, else why it ended."""
        clock = self._means.clock
        while True:
            changed = self._changed
            if self._inner is None:
                await changed.wait()
                if self._ended is not None:
                    return self._ended
            reading = await self._poll_child(clock.now_s())
            if reading is not None and reading.ready:
                self._compose()
                return None
            if reading is not None:
                await clock.sleep(LOOK_INTERVAL_S)

    def _tell_switch(self, ended: str | None) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        self._ended = ended
        changed.set()

    async def before_removal(self, file: GgufFile) -> None:
        """Its child reads the file from the disk."""
        if file.path.absolute() == self.config.model_file.absolute():
            raise Refused(400, f"'{self.config.name}' is the model that this node was started with")
        await self.unload(model_name(file.path))

    def folder_changed(self) -> None:
        self._means.on_change()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close the pipe, which ends it; after 2 s, kill it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), STOP_WAIT_S)
    except TimeoutError:
        log.warning("the embedded server did not end by itself and is killed")
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def how_it_ended(status: int, *, listened: bool, last_line: str = "") -> str:
    """`exited before ready, signal 4 (illegal instruction)`."""
    start = "exited" if listened else "exited before ready"
    if status == NO_ENGINE:
        return MISSING_ENGINE
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else ""
        return f"{start}, signal {-status} ({_SIGNAL_WORDS.get(name, name.lower() or 'unknown')})"
    if status in _WINDOWS_CRASHES:
        return f"{start}, status {status:#x} ({_WINDOWS_CRASHES[status]})"
    return f"{start}, status {status}" + (f": {last_line}" if last_line and status else "")


def _url_in(line: bytes) -> str | None:
    try:
        url = json.loads(line)["url"]
    except (ValueError, KeyError, TypeError):
        return None
    return url if isinstance(url, str) else None


class LogFilter:
    """Cuts the engine's lines where they begin to quote a request: no prompt text is ever logged."""

    _MARK = b"got exception:"
    _INSTEAD = b"got exception (what it quotes of the request is left out)"

    def __init__(self) -> None:
        self._line = b""
        self._cut = False

    def feed(self, piece: bytes) -> bytes:
        """What may be written of it; an unfinished line waits for its end."""
        out = []
        for part in piece.splitlines(keepends=True):
            if not self._cut:
                self._line += part
                if (at := self._line.find(self._MARK)) >= 0:
                    out.append(self._line[:at] + self._INSTEAD + b"\n")
                    self._line, self._cut = b"", True
            if part.endswith((b"\n", b"\r")):
                out.append(self._line)
                self._line, self._cut = b"", False
        return b"".join(out)


@contextlib.contextmanager
def _private_log(file: Path) -> Iterator[int]:
    """Open for appending, readable by the owner only; begun anew when it has grown large."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    if (_size(file) or 0) > MAX_LOG_BYTES:
        flags |= os.O_TRUNC
    descriptor = os.open(file, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
