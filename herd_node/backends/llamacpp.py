"""A llama-server with one model. It serves what it was started with, so nothing is ever loaded from here.

It takes any model name for its own, so the name is checked by the agent; and it queues without bound, so the
slots are counted there too. Wire facts: docs/backends.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from herd_node.backends.base import Facts, Reading
from herd_node.backends.calls import Answer, NoAnswer, ask, error_text, mapping, objects, text, whole, words
from herd_node.backends.polled import Polled, facts_of
from herd_node.protocol.wire import BackendKind, Model

#: Asked more often, /slots makes the server deaf to a hang-up: it then finishes the whole prompt for nobody.
SLOTS_INTERVAL_S = 1.0
#: A probe that found all slots busy is tried again after this time.
PROBE_INTERVAL_S = 15.0
PROBE_TIMEOUT_S = 2.0


class LlamaCpp(Polled):
    kind: BackendKind = "llama-server"

    _upstream_id = ""
    _extra: Facts | None = None
    _probed: tuple[str, bool] | None = None
    _tried: tuple[str, float] = ("", 0.0)
    _slept_at_s: float | None = None
    _first_seen_wall_s: float | None = None
    _slots_seen: tuple[float, int | None] = (float("-inf"), None)

    async def _read(self, now_s: float) -> Reading:
        # 1. /health, /props and /v1/models neither wake a sleeping model nor wait for a busy one
        health = await self._get("/health")
        if health.status == 503:
            return self._loading(health)
        props, listed = await asyncio.gather(self._get("/props"), self._get("/v1/models"))
        for path, answer in (("/props", props), ("/v1/models", listed)):
            if answer.status == 503:
                return self._loading(answer)
            if not answer.fields:
                return self._unfit(path, answer)
        entries = objects(listed.fields.get("data"))
        slots = whole(props.fields.get("total_slots"))
        if not entries or slots is None:
            return self._unfit("/v1/models" if slots is not None else "/props", listed)
        # 2. what is asked once a model
        asleep = props.fields.get("is_sleeping") is True
        self._slept_at_s = (now_s if self._slept_at_s is None else self._slept_at_s) if asleep else None
        self._upstream_id = text(entries[0].get("id")) or ""
        embeds = await self._embeds(now_s, asleep)
        # 3. the entry
        model = describe(self.id, props.fields, entries[0], embeds=embeds)
        self._extra = extra_facts(props.fields, entries[0])
        # Its `created` is the time of the question; lists want one that stays.
        self._first_seen_wall_s = self._first_seen_wall_s or self._extra.created_s
        state = replace(
            model,
            state="warm" if asleep else "hot",
            unloaded_s_ago=None if self._slept_at_s is None else now_s - self._slept_at_s,
            modified_s=self._first_seen_wall_s,
            slots=self._means.slots or slots,
        )
        return Reading(
            kind=self.kind, version=text(props.fields.get("build_info")), ready=True, models=(state,)
        )

    async def _endpoints(self, reading: Reading, now_s: float) -> tuple[str, ...]:
        """Any POST wakes a sleeping model, so a sleeping one is not asked."""
        if any(model.state != "hot" for model in reading.models):
            return self._offers.endpoints
        return await super()._endpoints(reading, now_s)

    def upstream_model(self, name: str) -> str | None:
        return None if self.model(name) is None else self._upstream_id

    def facts(self, name: str) -> Facts | None:
        model = self.model(name)
        if model is None or self._extra is None:
            return None
        extra = self._extra
        return facts_of(model, self._upstream_id)._replace(
            embedding_length=extra.embedding_length,
            created_s=extra.created_s,
            chat_template=extra.chat_template,
            supports_tools=extra.supports_tools,
            supports_thinking=extra.supports_thinking,
            supports_vision=extra.supports_vision,
        )

    async def slots_taken(self) -> int | None:
        """Busy slots by the server's own word, at most a second old. None: unknown (asleep, or --no-slots).

        Call it only while something is in flight; a sleeping server would be woken by it.
        """
        now_s = self._means.clock.now_s()
        seen_s, taken = self._slots_seen
        if now_s - seen_s < SLOTS_INTERVAL_S:
            return taken
        if not self.reading.ready or any(model.state != "hot" for model in self.reading.models):
            return None
        self._slots_seen = (now_s, taken)  # before the question: two callers must not ask twice
        try:
            answer = await self._get("/slots")
        except NoAnswer:
            taken = None
        else:
            taken = busy_slots(answer)
        self._slots_seen = (now_s, taken)
        return taken

    def _not_ready(self, reason: str, *, detect_again: bool = True) -> Reading:
        self._probed = None  # it may come back with other flags
        return super()._not_ready(reason, detect_again=detect_again)

    def _loading(self, answer: Answer) -> Reading:
        reason = error_text(answer.body) or "503 without a reason"
        reading = self._not_ready(f"llama-server at {self.url} is not ready: {reason}")
        models = tuple(replace(model, state="loading") for model in reading.models)
        return replace(reading, models=models)

    async def _embeds(self, now_s: float, asleep: bool) -> bool | None:
        """Whether it embeds: its lists never say, so one word is tried, once a model. None: not known yet."""
        if self._probed is not None and self._probed[0] == self._upstream_id:
            return self._probed[1]
        tried_id, tried_s = self._tried
        if asleep or (tried_id == self._upstream_id and now_s < tried_s + PROBE_INTERVAL_S):
            return None
        self._tried = (self._upstream_id, now_s)
        payload = {"model": self._upstream_id, "input": "hello"}
        try:
            answer = await ask(
                self._means.http,
                f"{self.url}/v1/embeddings",
                headers=self.headers,
                payload=payload,
                read_timeout_s=PROBE_TIMEOUT_S,
            )
        except NoAnswer:  # all slots are busy: it would queue without end
            return None
        if answer.status == 503:
            return None
        self._probed = (self._upstream_id, bool(objects(answer.fields.get("data"))))
        return self._probed[1]


def describe(
    backend: str, props: dict[str, object], entry: dict[str, object], *, embeds: bool | None
) -> Model:
    """The heartbeat's entry for the model of a single-model llama-server, without its state."""
    meta = mapping(entry.get("meta"))
    name, aliases = names_of(props, entry)
    context_tokens = whole(mapping(props.get("default_generation_settings")).get("n_ctx"))
    return Model(
        name=name,
        aliases=aliases,
        backend=backend,
        capabilities=capabilities_of(props, embeds=embeds),
        size_bytes=whole(meta.get("size")) or None,
        parameters=whole(meta.get("n_params")) or None,
        quantisation=text(meta.get("ftype")) or text(props.get("model_ftype")),
        context_train_tokens=whole(meta.get("n_ctx_train")) or None,
        context_tokens=context_tokens or whole(meta.get("n_ctx")) or None,
        context_fixed=True,
        embedding_length=whole(meta.get("n_embd")) or None,
        family="llamacpp",
    )


def names_of(props: dict[str, object], entry: dict[str, object]) -> tuple[str, tuple[str, ...]]:
    """The first alias, else the stem of the model's file; never a path. Then the other aliases."""
    path = text(props.get("model_path"))
    aliases = [alias for alias in words(entry.get("aliases")) if alias and not _is_path(alias, path)]
    if aliases:
        return aliases[0], tuple(aliases[1:])
    return file_stem(path or text(entry.get("id")) or "model"), ()


def _is_path(alias: str, path: str | None) -> bool:
    """Without `-a` the only alias is the model's path."""
    return alias == path or alias.lower().endswith(".gguf") or alias.startswith(("/", "\\"))


def file_stem(path: str) -> str:
    """`/a/b/Name.Q4_1.gguf` and `C:\\a\\Name.Q4_1.gguf` → `Name.Q4_1`."""
    name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return name[: -len(".gguf")] if name.lower().endswith(".gguf") else name


def capabilities_of(props: dict[str, object], *, embeds: bool | None) -> tuple[str, ...]:
    """From the template and the modalities; its own list of capabilities always says `completion`."""
    can = ["completion"]
    if embeds:
        can.append("embedding")
    if mapping(props.get("chat_template_caps")).get("supports_tools") is True:
        can.append("tools")
    if "<think>" in (text(props.get("chat_template")) or ""):
        can.append("thinking")
    modalities = mapping(props.get("modalities"))
    can.extend(word for word in ("audio", "vision") if modalities.get(word) is True)
    return tuple(sorted(can))


def extra_facts(props: dict[str, object], entry: dict[str, object]) -> Facts:
    """What a translator needs and a heartbeat does not carry."""
    template = text(props.get("chat_template"))
    return Facts(
        name="",
        upstream_id="",
        embedding_length=whole(mapping(entry.get("meta")).get("n_embd")),
        created_s=float(created) if (created := whole(entry.get("created"))) else None,
        chat_template=template,
        supports_tools=_flag(mapping(props.get("chat_template_caps")).get("supports_tools")),
        supports_thinking=None if template is None else "<think>" in template,
        supports_vision=_flag(mapping(props.get("modalities")).get("vision")),
    )


def busy_slots(answer: Answer) -> int | None:
    slots: Sequence[dict[str, object]] = objects(answer.body)
    if answer.status != 200 or not slots:
        return None
    return sum(slot.get("is_processing") is True for slot in slots)


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
