"""How much context and memory a request needs on an instance, and what room there is (docs/scheduling.md §1).

Also what becomes of options that would make a backend load a model anew. Bytes and tokens only: no seconds
are made here, and nothing here decides who is served.
"""

from __future__ import annotations

from typing import NamedTuple

from herd.fleet.snapshot import InstanceView, NodeView
from herd.request import LoadOptions
from herd.scheduling.policy import Policy

WEIGHTS_FACTOR = 1.03
OVERHEAD_BYTES = 0.4e9

#: Backends that load and unload by themselves: only their models can be evicted, or loaded again with more
#: context. The others serve what they were started with.
EVICTING_KINDS = frozenset({"ollama"})


def load_context_tokens(instance: InstanceView, wanted_tokens: int | None, policy: Policy) -> int:
    """Context that the instance would have once loaded for a request that wants `wanted_tokens`."""
    tokens = wanted_tokens or instance.context_tokens or policy.default_context_tokens
    if instance.context_train_tokens:
        return min(tokens, instance.context_train_tokens)
    return tokens


def memory_need_bytes(instance: InstanceView, context_tokens: int, policy: Policy) -> float | None:
    """Weights, overhead and KV. None when the size of the weights is not known."""
    if instance.size_bytes is None:
        return None
    kv_bytes = instance.kv_bytes_per_token or policy.kv_bytes_per_token
    return instance.size_bytes * WEIGHTS_FACTOR + OVERHEAD_BYTES + context_tokens * kv_bytes


class Memory(NamedTuple):
    """Memory that models of a node live in: that of its GPUs, else RAM under the capacity ceiling."""

    capacity_bytes: float | None
    free_bytes: float | None


def memory(node: NodeView, policy: Policy) -> Memory:
    if node.gpu_total_bytes is not None:
        used = node.gpu_used_bytes
        free = None if used is None else max(0.0, float(node.gpu_total_bytes - used))
        return Memory(float(node.gpu_total_bytes), free)
    if node.memory_total_bytes is None:
        return Memory(None, None)
    ceiling = node.memory_total_bytes * policy.memory_ceiling_ratio
    if node.memory_available_bytes is None:
        return Memory(ceiling, None)
    reserve = node.memory_total_bytes - ceiling
    return Memory(ceiling, max(0.0, node.memory_available_bytes - reserve))


def is_resident(instance: InstanceView) -> bool:
    return instance.state in ("hot", "loading")


def others_resident(node: NodeView, instance: InstanceView) -> list[InstanceView]:
    """Other instances in memory that the same backend could unload, in no particular order."""
    if instance.backend_kind not in EVICTING_KINDS:
        return []
    return [
        x
        for x in node.instances
        if x.key != instance.key and x.backend_id == instance.backend_id and is_resident(x)
    ]


class Room(NamedTuple):
    """What must go before an instance can be loaded: so many bytes, and at least so many models."""

    missing_bytes: float
    missing_places: int

    @property
    def is_enough(self) -> bool:
        return self.missing_bytes <= 0 and self.missing_places <= 0


def room_for(node: NodeView, instance: InstanceView, wanted_tokens: int | None, policy: Policy) -> Room:
    """What is missing for a load now. What is not known is taken to be enough."""
    need = memory_need_bytes(instance, load_context_tokens(instance, wanted_tokens, policy), policy)
    free = memory(node, policy).free_bytes
    missing = 0.0 if need is None or free is None else max(0.0, need - free)
    places = 0
    if node.max_loaded is not None:
        places = max(0, len(others_resident(node, instance)) + 1 - node.max_loaded)
    return Room(missing, places)


def freed_bytes(victim: InstanceView, policy: Policy) -> float:
    """What unloading `victim` gives back; 0 when its size is not known."""
    return memory_need_bytes(victim, load_context_tokens(victim, None, policy), policy) or 0.0


def longest_prompt_tokens(instance: InstanceView, policy: Policy) -> float:
    """Estimated prompt beyond which a fixed context is surely too small; infinity where it is not fixed."""
    if not instance.context_fixed or not instance.context_tokens:
        return float("inf")
    return instance.context_tokens * policy.estimate_doubt


def wanted_exceeds_fixed_context(instance: InstanceView, wanted_tokens: int | None) -> bool:
    if not instance.context_fixed or not instance.context_tokens or wanted_tokens is None:
        return False
    return wanted_tokens > instance.context_tokens


def is_reload(instance: InstanceView, wanted_tokens: int | None, policy: Policy) -> bool:
    """Serving `wanted_tokens` there means that the backend loads the model anew, with another context.

    Where the caller's number is replaced only a larger one does; where it goes on as it is, any other.
    """
    if instance.context_fixed or not instance.context_tokens or wanted_tokens is None:
        return False
    if not is_resident(instance):
        return False
    tokens = load_context_tokens(instance, wanted_tokens, policy)
    if policy.context_protection == "strip":
        return tokens > instance.context_tokens
    return tokens != instance.context_tokens


class ContextUse(NamedTuple):
    """What becomes of a request's load-time options on the loaded model that serves it."""

    reload: bool = False
    """The backend will load the model anew for it."""
    num_ctx: int | None = None
    """To be written over the caller's."""
    removed: tuple[str, ...] = ()
    """Options that are not to reach the backend."""
    unequal: tuple[str, ...] = ()
    """Options that ask for another load than there is; they go on, unless they are replaced or removed."""


AS_ASKED = ContextUse()

#: What Ollama takes where neither the request nor the model says anything (docs/backends.md).
_DEFAULTS: LoadOptions = (
    ("num_batch", 512),
    ("num_gpu", -1),
    ("main_gpu", 0),
    ("use_mmap", False),
    ("num_thread", 0),
    ("draft_num_predict", 4),
)
#: A request that says nothing of it takes it as it is.
_LEFT_AS_IT_IS = "num_gpu"


def context_use(
    instance: InstanceView,
    wanted_tokens: int | None,
    options: LoadOptions,
    loaded_with: LoadOptions,
    policy: Policy,
) -> ContextUse:
    """`loaded_with`: the options, beside num_ctx, that it was loaded with, as far as is known.

    1 only a model that is loaded can be loaded anew, and only by a backend that does so by itself;
    2 it will be, for another context, or because it has options that the request lacks: then it is loaded as
      the request says;
    3 it need not be: a context that is large enough becomes the one there is, other options are removed.
    """
    if instance.state != "hot" or instance.backend_kind not in EVICTING_KINDS:  # 1
        return AS_ASKED
    protects, loaded_tokens = policy.context_protection == "strip", instance.context_tokens
    tokens = None if wanted_tokens is None else load_context_tokens(instance, wanted_tokens, policy)
    other_context = tokens is not None and loaded_tokens is not None and tokens != loaded_tokens
    others = tuple([name for name, value in options if (name, value) not in loaded_with])
    telling = [x for x in options if x not in loaded_with and x not in _DEFAULTS]
    unequal = (*(("num_ctx",) if other_context else ()), *[name for name, _ in telling])
    lacking = [x for x in loaded_with if x not in options and x[0] != _LEFT_AS_IT_IS]
    reload = is_reload(instance, wanted_tokens, policy) or bool(lacking)
    if reload or not protects:  # 2
        return ContextUse(reload or bool(telling), unequal=unequal)
    num_ctx = loaded_tokens if wanted_tokens is not None and wanted_tokens != loaded_tokens else None
    return ContextUse(False, num_ctx, others, unequal)  # 3
