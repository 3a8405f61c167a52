"""May this node serve this request, and if not: why, and is there hope (docs/scheduling.md §1, exclusions).

One table says for each reason how hopeful it is; `plan` turns the most hopeful one over the chain into
Hold, 400 or 404. Nothing here scores.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Literal, NamedTuple

from herd.fleet.snapshot import InstanceView, ModelName, NodeView
from herd.scheduling.context import (
    freed_bytes,
    is_resident,
    load_context_tokens,
    memory,
    memory_need_bytes,
    others_resident,
    room_for,
    wanted_exceeds_fixed_context,
)
from herd.scheduling.policy import Policy

#: Ollama puts the prompt of `/v1/completions` into the model's chat template, every other server takes it as
#: it is (docs/compatibility.md).
Prompts = Literal["raw", "templated"]


class Hope(IntEnum):
    """How hopeful a reason is; the greatest over the chain decides."""

    NOWHERE = 0
    """The node does not list the model."""
    NEVER = 1
    """This request can never be served there."""
    SPENT = 2
    """It failed there for this very request."""
    NOT_NOW = 3
    """It may be possible soon."""


class Reason(StrEnum):
    """Why a node is no candidate. The words stand in traces and in `herd explain`."""

    TRIED = "tried"
    NOT_PINNED = "not_pinned"
    OTHER_PROMPTS = "other_prompts"
    OFFLINE = "offline"
    UNREACHABLE = "unreachable"
    PENDING = "pending"
    DRAINING = "draining"
    BREAKER_OPEN = "breaker_open"
    PAUSED = "paused"
    HEAT_CRITICAL = "heat_critical"
    BACKEND_NOT_READY = "backend_not_ready"
    MODEL_ABSENT = "model_absent"
    CAPABILITY_MISSING = "capability_missing"
    CONTEXT_TOO_SMALL = "context_too_small"
    MODEL_TOO_LARGE = "model_too_large"
    MEMORY_TOO_SMALL = "memory_too_small"
    PRESSURE_CRITICAL = "pressure_critical"
    MODEL_BAD = "model_bad"
    BUSY_MARK = "busy_mark"


class ReasonRow(NamedTuple):
    hope: Hope
    sentence: str
    """What is the matter with the node, as the end of a sentence."""


REASONS: dict[Reason, ReasonRow] = {
    Reason.TRIED: ReasonRow(Hope.SPENT, "the request has already failed there"),
    Reason.NOT_PINNED: ReasonRow(Hope.NOWHERE, "the request is for another node alone"),
    Reason.OTHER_PROMPTS: ReasonRow(
        Hope.NEVER,
        "the server there makes something else of a prompt: one applies a template, the other none",
    ),
    Reason.OFFLINE: ReasonRow(Hope.NOT_NOW, "the node is offline"),
    Reason.UNREACHABLE: ReasonRow(Hope.NOT_NOW, "the node sends heartbeats but cannot be reached"),
    Reason.PENDING: ReasonRow(Hope.NOT_NOW, "the node is not approved yet"),
    Reason.DRAINING: ReasonRow(Hope.NOT_NOW, "the node is draining"),
    Reason.BREAKER_OPEN: ReasonRow(Hope.NOT_NOW, "the node failed several times in a row and is left alone"),
    Reason.PAUSED: ReasonRow(Hope.NOT_NOW, "the node is paused"),
    Reason.HEAT_CRITICAL: ReasonRow(Hope.NOT_NOW, "the node is too hot"),
    Reason.BACKEND_NOT_READY: ReasonRow(Hope.NOT_NOW, "the node's backend is not ready"),
    Reason.MODEL_ABSENT: ReasonRow(Hope.NOWHERE, "the node does not have the model"),
    Reason.CAPABILITY_MISSING: ReasonRow(Hope.NEVER, "the model there lacks what the request needs"),
    Reason.CONTEXT_TOO_SMALL: ReasonRow(
        Hope.NEVER, "the context there is fixed and too small for the request"
    ),
    Reason.MODEL_TOO_LARGE: ReasonRow(Hope.NEVER, "the model is larger than the memory of the machine"),
    Reason.MEMORY_TOO_SMALL: ReasonRow(Hope.NOT_NOW, "the machine is short of memory"),
    Reason.PRESSURE_CRITICAL: ReasonRow(Hope.NOT_NOW, "the machine is under critical memory pressure"),
    Reason.MODEL_BAD: ReasonRow(Hope.NOT_NOW, "the model could not be loaded there a moment ago"),
    Reason.BUSY_MARK: ReasonRow(Hope.NOT_NOW, "the node said that it is busy"),
}


class Needs(NamedTuple):
    """What of a request decides where it may go, apart from its length. Equal needs share kept rows."""

    model: str
    words: frozenset[str]
    wanted_context_tokens: int | None
    only: str | None = None
    """The one node that may serve it."""
    prompts: Prompts | None = None
    """Text completions: what the server must make of a prompt; None: anything."""


_STATUS: dict[str, Reason] = {"pending": Reason.PENDING, "draining": Reason.DRAINING}

Found = tuple[Reason, float] | None
"""A reason and the instant at which it ends by itself (infinity when only a new view can end it)."""

_FOREVER: float = float("inf")


def why_not(node: NodeView, instance: InstanceView, needs: Needs, policy: Policy, now_s: float) -> Found:
    """The first reason against it, or None. What is wrong for ever is looked at before what may pass.

    A node that is offline still counts as a holder that may come back, unless it could never serve it.
    """
    if needs.only is not None and node.node_id != needs.only:
        return Reason.NOT_PINNED, _FOREVER
    never = _never(node, instance, needs, policy)
    if never is not None:
        return never, _FOREVER
    return _node_not_now(node, policy, now_s) or _instance_not_now(node, instance, needs, policy, now_s)


def _never(node: NodeView, instance: InstanceView, needs: Needs, policy: Policy) -> Reason | None:
    if not has_capabilities(instance, needs):
        return Reason.CAPABILITY_MISSING
    if needs.prompts is not None and needs.prompts != prompts_on(instance.backend_kind):
        return Reason.OTHER_PROMPTS
    if wanted_exceeds_fixed_context(instance, needs.wanted_context_tokens):
        return Reason.CONTEXT_TOO_SMALL
    if not is_resident(instance) and is_larger_than_machine(node, instance, needs, policy):
        return Reason.MODEL_TOO_LARGE
    return None


def _node_not_now(node: NodeView, policy: Policy, now_s: float) -> Found:
    if node.status == "offline":
        # Beats come in, calls do not get through: the commonest trouble at home deserves its own word.
        heard = now_s - node.last_beat_s <= policy.offline_after_s
        return (Reason.UNREACHABLE if heard else Reason.OFFLINE), _FOREVER
    if node.status in _STATUS:
        return _STATUS[node.status], _FOREVER
    if node.breaker_open_until_s > now_s:
        return Reason.BREAKER_OPEN, node.breaker_open_until_s
    if node.paused:
        return Reason.PAUSED, _FOREVER
    if node.heat == "critical":
        return Reason.HEAT_CRITICAL, _FOREVER
    return None


def _instance_not_now(
    node: NodeView, instance: InstanceView, needs: Needs, policy: Policy, now_s: float
) -> Found:
    if not node.backends_ready.get(instance.backend_id, True):
        return Reason.BACKEND_NOT_READY, _FOREVER
    if not is_resident(instance):
        if node.pressure == "critical":
            return Reason.PRESSURE_CRITICAL, _FOREVER
        if instance.bad_until_s > now_s:
            return Reason.MODEL_BAD, instance.bad_until_s
        if is_short_of_memory(node, instance, needs, policy):
            return Reason.MEMORY_TOO_SMALL, _FOREVER
    if instance.busy_until_s > now_s:
        return Reason.BUSY_MARK, instance.busy_until_s
    return None


def prompts_on(backend_kind: str) -> Prompts:
    """What a server makes of the prompt of `/v1/completions`."""
    return "templated" if backend_kind == "ollama" else "raw"


def name_of(instance: InstanceView, canonical: str) -> ModelName | None:
    for name in instance.names:
        if name.canonical == canonical:
            return name
    return None


def has_capabilities(instance: InstanceView, needs: Needs) -> bool:
    """Every needed word is among those of the name that was asked for. No words at all: not known, let it."""
    name = name_of(instance, needs.model)
    return name is None or not name.capabilities or needs.words <= name.capabilities


def is_larger_than_machine(node: NodeView, instance: InstanceView, needs: Needs, policy: Policy) -> bool:
    context = load_context_tokens(instance, needs.wanted_context_tokens, policy)
    need = memory_need_bytes(instance, context, policy)
    capacity = memory(node, policy).capacity_bytes
    return need is not None and capacity is not None and need > capacity


def is_short_of_memory(node: NodeView, instance: InstanceView, needs: Needs, policy: Policy) -> bool:
    """Not even unloading everything else that can be unloaded would make room."""
    room = room_for(node, instance, needs.wanted_context_tokens, policy)
    if room.missing_bytes <= 0:
        return False
    return room.missing_bytes > sum(freed_bytes(x, policy) for x in others_resident(node, instance))


def most_hopeful(reasons: list[Reason]) -> Reason | None:
    """The first of the most hopeful reasons; None when there is none at all."""
    return max(reasons, key=lambda reason: REASONS[reason].hope, default=None)
