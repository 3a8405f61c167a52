"""A llama-server in router mode: several models, each a child of its own, loaded and unloaded on request.

Its list is all that is polled; whatever else is asked names a model and forbids loading one for it. What only
a loaded model tells (template, slots, whether it embeds) is remembered when it is unloaded again. Where its
models lie in the agent's folder, the agent manages them. Wire facts: docs/backends.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from herd_node.backends.base import Facts, LoadFailed, Means, Reading
from herd_node.backends.calls import (
    Answer,
    Headers,
    NoAnswer,
    ask,
    error_text,
    mapping,
    objects,
    text,
    whole,
    words,
)
from herd_node.backends.llamacpp import PROBE_TIMEOUT_S, capabilities_of, extra_facts
from herd_node.backends.openai_compatible import UNKNOWN_CAPABILITIES
from herd_node.backends.polled import Polled, facts_of
from herd_node.models.folder import GgufFile
from herd_node.models.folder_manager import FolderManager
from herd_node.net.pool import Origin
from herd_node.protocol.names import canonical, is_model_name
from herd_node.protocol.wire import BackendKind, Model, ModelState

log = logging.getLogger(__name__)

#: How often a load or an unload is looked after; both are answered before they are done.
LOOK_INTERVAL_S = 0.25
LOAD_TIMEOUT_S = 3600.0
UNLOAD_TIMEOUT_S = 60.0
#: Where neither the server nor its flags say it: llama-server's own default.
DEFAULT_SLOTS = 4
#: Of the endpoints that not every backend has, the one that was seen to work in this mode.
ENDPOINTS = ("/v1/messages",)

_STATES: Mapping[str, ModelState] = {"loaded": "hot", "loading": "loading", "sleeping": "warm"}
_RUNNING = ("loaded", "loading", "sleeping")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a model told while it was loaded."""

    props: dict[str, object]
    embeds: bool | None = None


class LlamaRouter(Polled):
    kind: BackendKind = "llama-router"

    def __init__(
        self, origin: Origin, means: Means, *, headers: Headers = (), backend: str | None = None
    ) -> None:
        super().__init__(origin, means, headers=headers, backend=backend)
        self._folder_manager = FolderManager(self, means.downloads, lambda: self._in_folder)
        self.manager = self._folder_manager
        self._in_folder = False
        self._known: dict[str, Known] = {}
        self._entries: dict[str, dict[str, object]] = {}
        self._loads: dict[str, asyncio.Task[LoadFailed | None]] = {}
        self._rescan = False

    async def _read(self, now_s: float) -> Reading:
        # 1. the list; asked to look at its folder again when a file came or went
        props = await self._get("/props")
        if props.fields.get("role") != "router":
            return self._unfit("/props", props)
        listed = await self._get("/models?reload=1" if self._rescan else "/models")
        if not isinstance(listed.fields.get("data"), list):
            return self._unfit("/models", listed)
        self._rescan = False
        entries = [entry for entry in objects(listed.fields["data"]) if is_model_name(entry.get("id"))]
        self._entries = {str(entry["id"]): entry for entry in entries if _status(entry) != "downloading"}
        # 2. what only a loaded model tells, once a load
        for name, entry in self._entries.items():
            if _status(entry) == "loaded" and name not in self._known:
                await self._learn(name)
        # 3. where the files lie
        models = await asyncio.to_thread(self._models)
        return Reading(
            kind=self.kind,
            version=text(props.fields.get("build_info")),
            ready=True,
            max_loaded=whole(props.fields.get("max_instances")) or None,
            models=models,
        )

    def facts(self, name: str) -> Facts | None:
        model = self.model(name)
        if model is None:
            return None
        extra = extra_facts(self._props_of(model.name), self._entries.get(model.name, {}))
        return facts_of(model, model.name)._replace(
            embedding_length=model.embedding_length,
            created_s=extra.created_s,
            chat_template=extra.chat_template,
            supports_tools=extra.supports_tools,
            supports_thinking=extra.supports_thinking,
            supports_vision=extra.supports_vision,
        )

    # -- the poll's parts

    async def _learn(self, name: str) -> None:
        """Neither question loads a model that was unloaded meanwhile."""
        query = f"?model={quote(name, safe='')}&autoload=false"
        props = await self._get(f"/props{query}")
        if whole(props.fields.get("total_slots")) is None:
            return
        payload = {"model": name, "input": "hello"}
        try:
            answer = await ask(
                self._means.http,
                f"{self.url}/v1/embeddings?autoload=false",
                headers=self.headers,
                payload=payload,
                read_timeout_s=PROBE_TIMEOUT_S,
            )
            embeds = bool(objects(answer.fields.get("data"))) if answer.status in (200, 501) else None
        except NoAnswer:  # all of its slots are busy
            embeds = None
        self._known[name] = Known(props=dict(props.fields), embeds=embeds)

    async def _endpoints(self, reading: Reading, now_s: float) -> tuple[str, ...]:
        """Not tried: without a model every path is refused alike."""
        return ENDPOINTS

    async def _look_at(self, name: str) -> dict[str, object]:
        """One entry as it is now, between two polls."""
        listed = objects((await self._get("/models")).fields.get("data"))
        entry = next((entry for entry in listed if entry.get("id") == name), None)
        if entry is None:
            return {}
        if _status(entry) == "loaded" and name not in self._known:
            await self._learn(name)
        if _status(entry) != _status(self._entries.get(name, {})):
            self._entries[name] = entry
            await self._compose()
        return entry

    async def _compose(self) -> None:
        self._set(replace(self.reading, models=await asyncio.to_thread(self._models)))

    def _models(self) -> tuple[Model, ...]:
        """Looks at the disk, so in a thread."""
        files = self._files()
        self._folder_manager.look()
        return tuple(self._model(name, entry, files) for name, entry in self._entries.items())

    def _files(self) -> dict[Path, GgufFile]:
        """The folder's files by their real path, where this server serves that folder."""
        downloads = self._means.downloads
        if downloads is None:
            return {}
        paths = [path for entry in self._entries.values() if (path := _file_of(entry)) is not None]
        folder = downloads.folder
        self._in_folder = all(map(folder.holds, paths)) if paths else folder.named
        return {file.path.resolve(): file for file in folder.files()} if self._in_folder else {}

    def _model(self, name: str, entry: dict[str, object], files: Mapping[Path, GgufFile]) -> Model:
        meta, props, flags = mapping(entry.get("meta")), self._props_of(name), _args(entry)
        path = _file_of(entry)
        file = files.get(Path(path).resolve()) if path is not None else None
        known = self._known.get(name)
        able = capabilities_of(props, embeds=known.embeds) if known is not None else UNKNOWN_CAPABILITIES
        slots = whole(props.get("total_slots")) or _number(flags, "--parallel", "-np") or DEFAULT_SLOTS
        context = whole(mapping(props.get("default_generation_settings")).get("n_ctx"))
        state = _STATES.get(_status(entry), "cold")
        return Model(
            name=name,
            aliases=tuple(alias for alias in words(entry.get("aliases")) if is_model_name(alias))
            + (file.aliases if file is not None else ()),
            backend=self.id,
            capabilities=able,
            state="loading" if name in self._loads and state == "cold" else state,
            size_bytes=whole(meta.get("size")) or (file.size_bytes if file is not None else None),
            parameters=whole(meta.get("n_params")) or None,
            quantisation=text(meta.get("ftype")) or text(props.get("model_ftype")),
            context_train_tokens=whole(meta.get("n_ctx_train")) or None,
            context_tokens=context or whole(meta.get("n_ctx")) or _context_of(flags, slots),
            context_fixed=True,
            embedding_length=whole(meta.get("n_embd")) or None,
            slots=self._means.slots or slots,
            digest=file.sha256 if file is not None else None,
            modified_s=file.modified_wall_s if file is not None else None,
            family="llamacpp",
        )

    def _props_of(self, name: str) -> dict[str, object]:
        known = self._known.get(name)
        return {} if known is None else known.props

    # -- loading and unloading

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None:
        """One load a model, owned by the agent. The options are the server's own, so they change nothing."""
        model = self.model(name) or self.model(canonical(name))
        if model is None:
            raise LoadFailed(f"model '{name}' not found", 404)
        if model.state in ("hot", "warm"):  # a sleeping one wakes by the request
            return
        task = self._loads.get(model.name)
        if task is None:
            task = self._means.tasks.spawn(self._load(model.name), name=f"load {model.name}")
            self._loads[model.name] = task
            self._means.on_change()
        failure = await asyncio.shield(task)
        if failure is not None:
            raise failure

    async def _load(self, name: str) -> LoadFailed | None:
        try:
            answer = await self._tell("load", name)
            if answer.status == 404:
                return LoadFailed(f"model '{name}' not found", 404)
            if answer.status != 200 and "already running" not in (error_text(answer.body) or ""):
                return LoadFailed(error_text(answer.body) or f"loading {name} failed ({answer.status})")
            return await self._until_loaded(name)
        except NoAnswer as silence:
            return LoadFailed(f"loading {name} failed: {silence}", 502)
        finally:
            self._loads.pop(name, None)
            await self._compose()
            self._means.on_change()

    async def _until_loaded(self, name: str) -> LoadFailed | None:
        clock = self._means.clock
        until_s = clock.now_s() + LOAD_TIMEOUT_S
        while clock.now_s() < until_s:
            status = mapping((await self._look_at(name)).get("status"))
            if status.get("value") == "loaded":
                return None
            if status.get("failed") is True:
                return LoadFailed(f"model '{name}' failed to load (exit code {status.get('exit_code')})")
            await clock.sleep(LOOK_INTERVAL_S)
        return LoadFailed(f"loading {name} took too long")

    async def unload(self, name: str) -> None:
        model = self.model(name) or self.model(canonical(name))
        if model is None:
            raise LoadFailed(f"model '{name}' not found", 404)
        try:
            answer = await self._tell("unload", model.name)
            said = error_text(answer.body) or ""
            if answer.status != 200 and "not running" not in said:
                raise LoadFailed(said or f"unloading {model.name} failed ({answer.status})", answer.status)
            await self._until_unloaded(model.name)
        except NoAnswer as silence:
            raise LoadFailed(f"unloading {model.name} failed: {silence}", 502) from None
        finally:
            self._means.on_change()

    async def _until_unloaded(self, name: str) -> None:
        """It lets a running stream finish first."""
        clock = self._means.clock
        until_s = clock.now_s() + UNLOAD_TIMEOUT_S
        while _status(await self._look_at(name)) in _RUNNING:
            if clock.now_s() >= until_s:
                raise LoadFailed(f"model '{name}' is still in use", 503)
            await clock.sleep(LOOK_INTERVAL_S)

    async def _tell(self, what: str, name: str) -> Answer:
        return await ask(
            self._means.http, f"{self.url}/models/{what}", headers=self.headers, payload={"model": name}
        )

    # -- its folder

    async def before_removal(self, file: GgufFile) -> None:
        """Its child holds the file open."""
        model = self.model(canonical(file.name))
        if model is not None and model.state != "cold":
            await self.unload(model.name)

    def folder_changed(self) -> None:
        self._rescan = True
        self._means.on_change()


def _status(entry: Mapping[str, object]) -> str:
    return text(mapping(entry.get("status")).get("value")) or ""


def _args(entry: Mapping[str, object]) -> tuple[str, ...]:
    """The child's command line: for this agent alone, it names paths."""
    return words(mapping(entry.get("status")).get("args"))


def _file_of(entry: Mapping[str, object]) -> str | None:
    return _flag(_args(entry), "--model", "-m") if entry.get("source") == "models_dir" else None


def _flag(args: tuple[str, ...], *names: str) -> str | None:
    for position, word in enumerate(args[:-1]):
        if word in names:
            return args[position + 1]
    return None


def _number(args: tuple[str, ...], *names: str) -> int | None:
    value = _flag(args, *names)
    return int(value) if value is not None and value.isascii() and value.isdigit() and int(value) else None


def _context_of(args: tuple[str, ...], slots: int) -> int | None:
    """With a number of slots the context is shared out over them."""
    context = _number(args, "--ctx-size", "-c")
    return context // slots if context and _number(args, "--parallel", "-np") else None
