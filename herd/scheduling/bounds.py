"""How far a request may go: which node alone, servers of which kind, and whether to another model. Pure.

What it needs there, and whether there is room, is `eligibility`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator

from herd.fleet.snapshot import FleetSnapshot, Holder
from herd.request import InferenceRequest
from herd.scheduling.eligibility import Needs, Prompts, prompts_on
from herd.scheduling.policy import Policy
from herd.scheduling.steps import History

#: What may be served by a model that the caller did not name: an answer in words. Vectors, ranks and texts in
#: a model's own marks (`/v1/completions`) mean something else to another model.
_REPLACEABLE = frozenset({"chat", "generate", "responses"})


def needs_of(request: InferenceRequest, model: str, history: History, snapshot: FleetSnapshot) -> Needs:
    """What decides where a request may go if `model` is to serve it."""
    prompts = None
    if request.route.kind == "completion":
        prompts = history.prompts or _prompts_of_holders(request, snapshot)
    needs = (model, request.needs, request.wanted_context_tokens, request.only, prompts)
    return tuple.__new__(Needs, needs)


def _prompts_of_holders(request: InferenceRequest, snapshot: FleetSnapshot) -> Prompts | None:
    """What all holders of the requested model do; None where they differ, or where there is none."""
    kinds = {prompts_on(one.backend_kind) for _, one in holders_of(request.chain[0], request.only, snapshot)}
    return kinds.pop() if len(kinds) == 1 else None


def holders_of(model: str, only: str | None, snapshot: FleetSnapshot) -> Iterator[Holder]:
    """Those who have the model, of the one node that is allowed, if one alone is."""
    for holder in snapshot.holders.get(model, ()):
        if only is None or holder[0].node_id == only:
            yield holder


def may_be_replaced(request: InferenceRequest, policy: Policy) -> bool:
    """Whether a loaded model that it does not name may serve it, rather than that its own is loaded."""
    fallback = request.fallback
    if fallback != "loaded" and (fallback != "default" or not policy.vram_fallback):
        return False
    if policy.context_protection != "strip" and (request.load_options or request.wanted_context_tokens):
        return False  # what it says of the loading goes on as it is, and would have the other one loaded anew
    return request.route.kind in _REPLACEABLE
