"""An Ollama server: polled by its own lists, and the one backend whose models come and go.

The agent loads models itself, with an empty request that it keeps open: Ollama aborts a load when the client
that caused it leaves, so no caller's hang-up may be able to do that. Wire facts: docs/backends.md.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace

import orjson

from herd_node.backends.base import BOTH_DIALECTS, Facts, LoadFailed, Means, Reading
from herd_node.backends.calls import Headers, NoAnswer, ask, error_text, text
from herd_node.backends.ollama_lists import (
    Loaded,
    Runner,
    Seen,
    Shown,
    SlotRule,
    Tag,
    is_embedding_model,
    models_of,
    parse_ps,
    parse_runner,
    parse_show,
    parse_tags,
    residency_key,
)
from herd_node.backends.ollama_manager import OllamaManager
from herd_node.backends.polled import Polled
from herd_node.net.pool import Origin
from herd_node.protocol.names import canonical
from herd_node.protocol.wire import BackendKind, Model

log = logging.getLogger(__name__)

#: Shows a poll: four at once, until this time is over; a machine with 300 models is known after a few polls.
SHOWS_AT_ONCE = 4
SHOWS_FOR_S = 0.5
#: Ollama itself gives a load up after 5 min without progress; this only ends a wait that nothing else would.
LOAD_TIMEOUT_S = 3600.0
#: The options that belong to the runner and not to the request: another value is another load.
LOAD_OPTIONS = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict",
)  # fmt: skip
MODELS_A_GPU = 3


class Ollama(Polled):
    kind: BackendKind = "ollama"
    native = BOTH_DIALECTS

    def __init__(
        self, origin: Origin, means: Means, *, headers: Headers = (), backend: str | None = None
    ) -> None:
        super().__init__(origin, means, headers=headers, backend=backend)
        self._rule = SlotRule(forced=means.slots, num_parallel=means.num_parallel)
        self._shown: dict[str, Shown] = {}
        self._seen = Seen(tags=(), loaded=(), shown={})
        self._loads: dict[tuple[str, bytes], asyncio.Task[LoadFailed | None]] = {}
        self._loaded_with: dict[str, tuple[bytes, int | None]] = {}
        self.manager = OllamaManager(self, means.http, means.on_change)

    async def _read(self, now_s: float) -> Reading:
        # 1. the lists
        version = await self._get("/api/version")
        tags_answer = await self._get("/api/tags")
        ps_answer = await self._get("/api/ps")
        for path, answer in (("/api/version", version), ("/api/tags", tags_answer), ("/api/ps", ps_answer)):
            if not answer.fields:
                return self._unfit(path, answer)
        if not isinstance(tags_answer.fields.get("models"), list):
            return self._unfit("/api/tags", tags_answer)
        tags, loaded = parse_tags(tags_answer.fields), parse_ps(ps_answer.fields)
        # 2. once a digest: what only show knows
        await self._show_new(tags, loaded)
        # 3. the runners, where this user may see them
        runners = await asyncio.to_thread(self._runners)
        self._seen = Seen(
            tags=tags, loaded=loaded, shown=self._shown, runners=runners, wall_s=self._means.clock.wall_s()
        )
        models = self._models()
        self._forget_loads_that_ended(models)
        return Reading(
            kind=self.kind,
            version=text(version.fields.get("version")),
            ready=True,
            max_loaded=self._means.max_loaded or MODELS_A_GPU * max(1, self._means.gpu_count),
            models=models,
        )

    def facts(self, name: str) -> Facts | None:
        known = super().facts(name)
        if known is None:
            return None
        digest = next((tag.digest for tag in self._seen.tags if tag.name == known.name), "")
        shown = self._shown.get(digest, Shown())
        return known._replace(embedding_length=shown.embedding_length, digest=digest or known.digest)

    # -- the poll's parts

    async def _show_new(self, tags: tuple[Tag, ...], loaded: tuple[Loaded, ...]) -> None:
        """Loaded models first: their weights decide what is hot."""
        listed = {tag.digest: tag for tag in reversed(tags)}
        self._shown = {digest: shown for digest, shown in self._shown.items() if digest in listed}
        order = dict.fromkeys([entry.digest for entry in loaded if entry.digest in listed] + list(listed))
        unknown = [listed[digest] for digest in order if digest not in self._shown]
        clock = self._means.clock
        until_s = clock.now_s() + SHOWS_FOR_S
        while unknown and clock.now_s() <= until_s:
            batch, unknown = unknown[:SHOWS_AT_ONCE], unknown[SHOWS_AT_ONCE:]
            await asyncio.gather(*(self._show(tag) for tag in batch))

    async def _show(self, tag: Tag) -> None:
        try:
            answer = await ask(
                self._means.http, f"{self.url}/api/show", headers=self.headers, payload={"model": tag.name}
            )
        except NoAnswer as silence:
            log.debug("show %s: %s", tag.name, silence)
            return
        if answer.status == 503:
            return
        if not answer.fields:  # a broken file stays broken: what tags says of it must do
            log.warning("%s cannot show %s: %s", self.id, tag.name, error_text(answer.body) or answer.status)
        self._shown[tag.digest] = parse_show(answer.fields)

    def _runners(self) -> tuple[Runner, ...] | None:
        """None: not seen. Who listens may be a container's proxy or a tunnel, whose children say nothing."""
        owner = self._means.owner_of(self.origin)
        if owner is None or "ollama" not in owner.name.lower():
            return None
        return tuple(runner for line in owner.children if (runner := parse_runner(line)) is not None)

    def _models(self) -> tuple[Model, ...]:
        """The entries for what was seen last and what this agent is loading right now, warm ones marked."""
        loading = frozenset(key for key, _options in self._loads)
        seen = replace(self._seen, loading=loading)
        models = models_of(self.id, seen, self._rule, has_gpu=self._means.gpu_count > 0)
        warm, wall_s = self._means.warm, seen.wall_s
        keys = [f"{self.id} {residency_key(tag, self._shown.get(tag.digest, Shown()))}" for tag in seen.tags]
        hot = frozenset(key for key, model in zip(keys, models, strict=True) if model.state == "hot")
        warm.saw(self.id, hot, wall_s)
        return tuple(
            self._maybe_warm(model, warm.unloaded_s_ago(key, wall_s))
            for key, model in zip(keys, models, strict=True)
        )

    @staticmethod
    def _maybe_warm(model: Model, unloaded_s_ago: float | None) -> Model:
        if model.state != "cold" or unloaded_s_ago is None:
            return model
        return replace(model, state="warm", unloaded_s_ago=unloaded_s_ago)

    # -- loading

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None:
        """One load a (weights, options), owned by the agent: who waits may leave. Raises LoadFailed."""
        model = self.model(name)
        if model is None:
            raise LoadFailed(f"model '{name}' not found", 404)
        key, options = _key(model), pack_options(load_options)
        # 1. hot, and loaded with these options: nothing to do (the common case; no call)
        if model.state == "hot" and self._loaded_with.get(key) == (options, model.context_tokens):
            return
        # 2. somebody waits for the same load already: wait with them   3. else start it
        task = self._loads.get((key, options))
        if task is None:
            task = self._means.tasks.spawn(self._load(model, key, options), name=f"load {model.name}")
            self._loads[(key, options)] = task
            self._changed()
        failure = await asyncio.shield(task)
        if failure is not None:
            raise failure

    async def unload(self, name: str) -> None:
        """Ollama answers at once, and waits by itself until nothing runs on the model."""
        model = self.model(name)
        payload: dict[str, object] = {"model": name if model is None else model.name, "keep_alive": 0}
        if model is not None and is_embedding_model(model.capabilities):
            path, payload = "/api/embed", {**payload, "input": []}
        else:
            path, payload = "/api/generate", {**payload, "stream": False}
        try:
            answer = await ask(self._means.http, self.url + path, headers=self.headers, payload=payload)
        except NoAnswer as silence:
            raise LoadFailed(f"unloading {name} failed: {silence}", 502) from None
        if model is not None:
            self._loaded_with.pop(_key(model), None)  # a load that comes before the next poll is a real one
        self._means.on_change()
        if answer.status != 200:
            raise LoadFailed(error_text(answer.body) or f"unloading failed ({answer.status})", answer.status)

    async def _load(self, model: Model, key: str, options: bytes) -> LoadFailed | None:
        """Kept open until Ollama says that the model is loaded; on a loaded one it answers in 2 ms."""
        payload: dict[str, object]
        if is_embedding_model(model.capabilities):
            path, payload = "/api/embed", {"model": model.name, "input": []}
        else:
            path, payload = "/api/generate", {"model": model.name, "stream": False}
        payload.update(orjson.loads(options))
        failure: LoadFailed | None = None
        try:
            answer = await ask(
                self._means.http,
                self.url + path,
                headers=self.headers,
                payload=payload,
                read_timeout_s=LOAD_TIMEOUT_S,
                whole_timeout_s=LOAD_TIMEOUT_S,
            )
            if answer.status != 200:
                said = error_text(answer.body) or f"loading {model.name} failed ({answer.status})"
                failure = LoadFailed(said, answer.status)
        except NoAnswer as silence:
            failure = LoadFailed(f"loading {model.name} failed: {silence}", 502)
        finally:
            self._loads.pop((key, options), None)
        if failure is None:
            await self._loaded(key, options)
        else:
            log.warning("%s: %s", self.id, failure)
        self._changed()
        return failure

    async def _loaded(self, key: str, options: bytes) -> None:
        """Look once, so that the next request already finds the model hot."""
        try:
            ps = parse_ps((await self._get("/api/ps")).fields)
        except NoAnswer:
            return
        runners = await asyncio.to_thread(self._runners)
        self._seen = replace(self._seen, loaded=ps, runners=runners, wall_s=self._means.clock.wall_s())
        self._set(replace(self.reading, models=self._models()))
        for model in self.reading.models:
            if model.state == "hot" and key == _key(model):
                self._loaded_with[key] = (options, model.context_tokens)

    def _changed(self) -> None:
        if self.reading.ready:
            self._set(replace(self.reading, models=self._models()))
        self._means.on_change()

    def _forget_loads_that_ended(self, models: tuple[Model, ...]) -> None:
        hot = {_key(model): model.context_tokens for model in models if model.state == "hot"}
        self._loaded_with = {
            key: known for key, known in self._loaded_with.items() if key in hot and hot[key] == known[1]
        }


def _key(model: Model) -> str:
    """As `residency_key`: the weights file, or the name alone."""
    return model.weights or canonical(model.name)


def pack_options(load_options: Mapping[str, object]) -> bytes:
    """The body's fields that decide about a load, in one fixed spelling: equal loads are equal bytes."""
    options = {name: load_options[name] for name in LOAD_OPTIONS if load_options.get(name) is not None}
    fields: dict[str, object] = {"options": options} if options else {}
    if isinstance(load_options.get("shift"), bool):  # another value is another runner, too
        fields["shift"] = load_options["shift"]
    return orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
