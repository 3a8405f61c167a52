"""`options` of an Ollama request → sampling fields of the backend. Pure.

llama-server's own defaults differ (top_p 0.95, min_p 0.05), so Ollama's are always sent in full. A server of
the plain OpenAI dialect gets that dialect's own fields in full, and of the rest what the caller named.
"""

from __future__ import annotations

from herd_node.translate.base import ModelFacts, Refusal
from herd_node.translate.fields import Json

FLOAT_DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
INTEGER_DEFAULTS: dict[str, int] = {"top_k": 40, "repeat_last_n": 64, "seed": -1}

#: Fixed when the server was started: checked for their type, as Ollama does, and otherwise without effect.
FIXED_INTEGERS = ("num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict")
FIXED_BOOLEANS = ("use_mmap",)

#: The options that the OpenAI dialect has, too.
OPENAI_OPTIONS = ("temperature", "top_p", "presence_penalty", "frequency_penalty")

_INT32_MAX = 2**31 - 1
_CONTEXTS_BOUND = 10
"""An answer without `num_predict` ends after that many contexts."""


def sampling_fields(options: Json, facts: ModelFacts) -> dict[str, object]:
    """The fields to put into the upstream request. Unknown options are ignored, as Ollama ignores them."""
    fields: dict[str, object] = {
        name: _number(options, name, default) for name, default in FLOAT_DEFAULTS.items()
    }
    for name, default in INTEGER_DEFAULTS.items():
        fields[name] = _integer(options, name, default)
    fields["n_keep"] = _integer(options, "num_keep", 4)
    num_predict = _integer(options, "num_predict", -1)
    stop = _strings(options, "stop")
    _check_fixed(options, facts)
    if facts.flavour == "openai":
        fields = _openai_fields(options, fields, num_predict)
    else:
        if fields["repeat_last_n"] == -1:  # "the whole context", which llama-server does not understand
            fields["repeat_last_n"] = facts.context_tokens or INTEGER_DEFAULTS["repeat_last_n"]
        n_predict = _bounded_length(num_predict, facts.context_tokens)
        if n_predict is not None:
            fields["n_predict"] = n_predict
    if stop:
        fields["stop"] = stop
    return fields


def _openai_fields(options: Json, fields: dict[str, object], num_predict: int) -> dict[str, object]:
    """A seed below zero means chance and a length below zero no limit, as the absent field does there."""
    named = [name for name in (*FLOAT_DEFAULTS, "top_k", "repeat_last_n") if options.get(name) is not None]
    wanted = {name: fields[name] for name in (*OPENAI_OPTIONS, *named)}
    seed = fields["seed"]
    if isinstance(seed, int) and seed >= 0:
        wanted["seed"] = seed
    if num_predict > 0:
        wanted["max_tokens"] = num_predict
    return wanted


def _bounded_length(num_predict: int, context_tokens: int | None) -> int | None:
    if num_predict >= 0:
        return num_predict
    return None if context_tokens is None else _CONTEXTS_BOUND * context_tokens


def _check_fixed(options: Json, facts: ModelFacts) -> None:
    for name in FIXED_INTEGERS:
        _integer(options, name, 0)
    for name in FIXED_BOOLEANS:
        value = options.get(name)
        if value is not None and not isinstance(value, bool):
            raise Refusal(400, f'option "{name}" must be of type boolean')
    num_ctx = _integer(options, "num_ctx", 0)
    if facts.context_tokens is not None and num_ctx > facts.context_tokens:
        raise Refusal(
            400,
            f'option "num_ctx" is {num_ctx}, but the context of "{facts.name}" on this node is fixed at '
            f"{facts.context_tokens} tokens",
        )


def _integer(options: Json, name: str, default: int) -> int:
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refusal(400, f'option "{name}" must be of type integer')
    return int(max(-_INT32_MAX, min(_INT32_MAX, value)))


def _number(options: Json, name: str, default: float) -> float:
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refusal(400, f'option "{name}" must be of type float32')
    return float(value)


def _strings(options: Json, name: str) -> list[str]:
    value = options.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refusal(400, f'option "{name}" must be of type array')
    if not all(isinstance(item, str) for item in value):
        raise Refusal(400, f'option "{name}" must be of an array of strings')
    return value
