"""Any other server with `GET /v1/models`: vLLM, LM Studio, SGLang and their like. OpenAI's dialect only.

Such a list says little more than names. What is not known must not exclude a request, so every model counts
as hot, with four slots, and able to do what the dialect can ask; the server itself refuses what it cannot do.
"""

from __future__ import annotations

from herd_node.backends.base import Reading
from herd_node.backends.calls import objects, text, whole
from herd_node.backends.polled import Polled
from herd_node.protocol.names import is_model_name
from herd_node.protocol.wire import BackendKind, Model

DEFAULT_SLOTS = 4

#: Nothing tells a chat model from an embedding model here, so both are tried.
UNKNOWN_CAPABILITIES = ("completion", "embedding", "thinking", "tools", "vision")


class OpenAICompatible(Polled):
    kind: BackendKind = "openai"

    async def _read(self, now_s: float) -> Reading:
        answer = await self._get("/v1/models")
        if not isinstance(answer.fields.get("data"), list):
            return self._unfit("/v1/models", answer)
        entries = [(text(entry.get("id")), entry) for entry in objects(answer.fields["data"])]
        models = tuple(
            self._model(name, entry) for name, entry in entries if name is not None and is_model_name(name)
        )
        return Reading(kind=self.kind, ready=True, models=models)

    def _model(self, name: str, entry: dict[str, object]) -> Model:
        context_tokens = whole(entry.get("max_model_len"))  # vLLM's word
        return Model(
            name=name,
            backend=self.id,
            capabilities=UNKNOWN_CAPABILITIES,
            state="hot",
            context_tokens=context_tokens,
            context_fixed=context_tokens is not None,
            slots=self._means.slots or DEFAULT_SLOTS,
        )
