"""Context protection: what becomes of the options of a request that decide how Ollama loads a model.

Settled when the slot is taken, by the instance as the planner saw it; `sending` edits the body accordingly.
Remembers which options this router had a model loaded with, since no backend tells. Decides nothing about who
serves a request, and never logs a word of one.
"""

from __future__ import annotations

import logging

from herd.fleet.registry import Registry
from herd.request import InferenceRequest, LoadOptions
from herd.scheduling.context import AS_ASKED, EVICTING_KINDS, context_use, load_context_tokens
from herd.scheduling.plan import Attempt
from herd.scheduling.policy import Policy

_log = logging.getLogger(__name__)

_LOG_EVERY_S = 60.0


class Contexts:
    """One a waiting room."""

    def __init__(self, registry: Registry, policy: Policy) -> None:
        self._registry = registry
        self._policy = policy
        self._loaded_with: dict[tuple[str, str], LoadOptions] = {}
        """(node id, instance key) -> the options, of those that were loaded with any."""
        self._said_s: dict[str, float] = {}

    def concern(self, request: InferenceRequest) -> bool:
        """Whether `settle` may have anything to do."""
        return bool(request.wanted_context_tokens is not None or request.load_options or self._loaded_with)

    def settle(self, request: InferenceRequest, step: Attempt, now_s: float) -> Attempt:
        """The step with what is to be done about the request's options; before its slot is taken."""
        key, wanted, options = (
            (step.node_id, step.instance_key),
            request.wanted_context_tokens,
            request.load_options,
        )
        loaded_with = self._loaded_with.get(key, ())
        if wanted is None and not options and not loaded_with:
            return step
        instance = self._registry.instance(*key)
        if instance.backend_kind not in EVICTING_KINDS:
            return step
        use = context_use(instance, wanted, options, loaded_with, self._policy)
        if instance.state != "hot" or use.reload:
            self._loaded_with.pop(key, None)
            if options:
                self._loaded_with[key] = options
        if use.reload:
            tokens = None if wanted is None else load_context_tokens(instance, wanted, self._policy)
            self._registry.reload(*key, tokens, now_s)
        if use.unequal and self._policy.context_protection == "warn":
            self._warn(step, use.unequal, now_s)
        return step if use == AS_ASKED else step._replace(context=use)

    def _warn(self, step: Attempt, names: tuple[str, ...], now_s: float) -> None:
        """Once a model and minute."""
        if now_s - self._said_s.get(step.model, float("-inf")) < _LOG_EVERY_S:
            return
        self._said_s[step.model] = now_s
        _log.warning(
            "a request makes Ollama load model '%s' on node '%s' anew: its %s differs from what is loaded "
            "(FLEET_CONTEXT_PROTECTION=strip prevents that where it can)",
            step.model,
            step.node_id,
            ", ".join(names),
        )
