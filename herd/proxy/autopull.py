"""A model that no node has, pulled because somebody asked for it (FLEET_AUTO_PULL).

One pull for however many wait, onto the node with the most free memory that it fits; so its size must be
known first, by the registry or by its name. A pull that began goes on when its callers leave: the next one
has use for it. Off unless the setting says otherwise, because it connects outward and fills disks.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, Literal

import httpx

from herd.errors import ApiError, ModelNotFound, Saturated, UpstreamFailed, UpstreamTimeout
from herd.proxy.managing import Managing
from herd.proxy.pulls import Pull
from herd.request import Principal
from herd_node.protocol.names import canonical, source_of
from herd_node.runtime.clock import Clock
from herd_node.runtime.tasks import Tasks

_log = logging.getLogger(__name__)

Mode = Literal["off", "trusted", "on"]
SizeOf = Callable[[str], Awaitable[int | None]]

_TRUSTED: Final = frozenset({"loopback", "key", "admin"})
#: A pull that failed is not tried again for so long: the next caller gets the same answer.
_FAILED_S: Final = 60.0
#: Until a beat lists what was pulled.
_LISTED_S: Final = 20.0
_LOOK_S: Final = 0.2
_MANIFEST_S: Final = 10.0
_MAX_MANIFEST_BYTES: Final = 1024 * 1024
_REGISTRY: Final = "registry.ollama.ai"
#: Ollama's and the pullers' words for a model that does not exist.
_NOWHERE: Final = ("file does not exist", "not found", "404")


class AutoPull:
    """One a router."""

    def __init__(
        self,
        models: Managing,
        tasks: Tasks,
        clock: Clock,
        *,
        mode: Mode,
        timeout_s: float,
        size_of: SizeOf | None = None,
    ) -> None:
        self._models = models
        self._tasks = tasks
        self._clock = clock
        self._mode = mode
        self._timeout_s = timeout_s
        self._size_of = size_of or size_of_registry
        self._running: dict[str, asyncio.Task[ApiError | None]] = {}
        self._failed: dict[str, tuple[float, ApiError]] = {}

    def allows(self, principal: Principal | None) -> bool:
        """Whether this caller's question may start a pull."""
        if self._mode == "trusted":
            return principal is not None and principal.kind in _TRUSTED
        return self._mode == "on"

    def hint(self, model: str) -> str:
        """How to get a model that is not pulled by itself, as the end of a sentence."""
        return f"get it with `herd pull {model}`, or set FLEET_AUTO_PULL"

    def progress(self, model: str) -> Pull | None:
        """The pull of this model that runs, if one does."""
        wanted = canonical(model)
        return next((pull for pull in self._models.pulls if canonical(pull.model) == wanted), None)

    async def get(self, model: str, wait_s: float | None) -> None:
        """Returns once a node lists the model. Raises ApiError: Saturated when `wait_s` is over before."""
        key = canonical(model)
        until_s, error = self._failed.get(key, (0.0, None))
        if error is not None and self._clock.now_s() < until_s:
            raise error
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = self._tasks.spawn(self._pull(key, model), name=f"pull {key}")
        done, _ = await asyncio.wait([task], timeout=wait_s)
        if not done:
            raise self._not_yet(model)
        if (failure := task.result()) is not None:
            raise failure

    def _not_yet(self, model: str) -> ApiError:
        pull = self.progress(model)
        if pull is None:
            return Saturated(f"model '{model}' is about to be pulled; try again", retry_after_s=5)
        rest_s = pull.rest_s(self._clock.now_s())
        told = f"{pull.percent} % so far" + (f", about {rest_s:.0f} s left" if rest_s is not None else "")
        retry_after_s = 10 if rest_s is None else max(1, min(60, round(rest_s)))
        message = f"model '{model}' is being pulled to node '{pull.node_id}' ({told}); try again"
        return Saturated(message, retry_after_s=retry_after_s)

    async def _pull(self, key: str, model: str) -> ApiError | None:
        """None once it is there. Its failures are values: there may be nobody left to raise them to."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._carry_out(model)
            return None
        except TimeoutError:
            error: ApiError = UpstreamTimeout(f"pulling '{model}' took longer than {self._timeout_s:.0f} s")
        except ApiError as failure:
            error = failure
        finally:
            del self._running[key]
        _log.warning("a model could not be pulled by itself: %s", error.message)
        self._failed[key] = (self._clock.now_s() + _FAILED_S, error)
        return error

    async def _carry_out(self, model: str) -> None:
        size_bytes = size_by_name(model) if (known := await self._size_of(model)) is None else known
        if size_bytes is None:
            raise ModelNotFound(
                f"model '{model}' not found: no node of the fleet has it, and as its size is not known it is "
                f"not pulled by itself; get it with `herd pull {model}`",
                model=model,
            )
        node_id = self._models.to_pull(model, size_bytes)
        async with aclosing(self._models.pull(node_id, model)) as lines:
            await _to_the_end(lines, model, node_id)
        await self._until_listed(model)

    async def _until_listed(self, model: str) -> None:
        for _ in range(round(_LISTED_S / _LOOK_S)):
            if self._models.is_listed(model):
                return
            await self._clock.sleep(_LOOK_S)
        raise UpstreamFailed(f"model '{model}' was pulled, but no node lists it")


async def _to_the_end(lines: AsyncGenerator[dict[str, Any], None], model: str, node_id: str) -> None:
    async for line in lines:
        if "error" not in line:
            continue
        text = str(line["error"])
        if any(mark in text for mark in _NOWHERE):
            raise ModelNotFound(f"model '{model}' not found: {text}", model=model)
        raise UpstreamFailed(f"node '{node_id}' could not pull '{model}': {text}")


async def size_of_registry(model: str) -> int | None:
    """Bytes of a model's layers, as the registry says; None where it does not. Goes out to the Internet."""
    url = manifest_url(model)
    if url is None:
        return None
    try:
        # Outward, so the system's proxy counts, other than for calls to nodes.
        async with httpx.AsyncClient(timeout=_MANIFEST_S, follow_redirects=False) as http:
            answer = await http.get(url, headers={"accept": "application/json"})
        if answer.status_code != 200 or len(answer.content) > _MAX_MANIFEST_BYTES:
            return None
        layers = answer.json()["layers"]
        return sum(int(layer["size"]) for layer in layers)
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def manifest_url(model: str) -> str | None:
    """Where a name of Ollama's registry has its manifest; None for URLs, Hugging Face, other registries."""
    if source_of(model) != "registry":
        return None
    name, _, tag = model.removeprefix(f"{_REGISTRY}/").partition(":")
    parts = name.split("/")
    if len(parts) > 2 or "." in parts[0]:
        return None
    path = name if len(parts) == 2 else f"library/{name}"
    return f"https://{_REGISTRY}/v2/{path}/manifests/{tag or 'latest'}"


_PARAMETERS = re.compile(r"(?:^|[^a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)(b|m)(?:[^a-z0-9]|$)", re.IGNORECASE)
_BITS = re.compile(r"(?:^|[^a-z0-9])(?:i?q(\d)|(f16|fp16|bf16)|(f32|fp32))(?:[^0-9]|$)", re.IGNORECASE)
#: Of 4-bit quantisations, scales and the wider tensors included (docs/scheduling.md, memory).
_USUAL_BITS = 4.85


def size_by_name(model: str) -> int | None:
    """Bytes of the weights, where the name says how many parameters: `…:8b`, `…-8x7B-…Q4_K_M`; else None."""
    found = _PARAMETERS.search(model)
    if found is None:
        return None
    experts, number, unit = found.groups()
    parameters = float(number) * (1e9 if unit.lower() == "b" else 1e6) * int(experts or 1)
    quant = _BITS.search(model)
    bits = _USUAL_BITS
    if quant is not None:
        bits = 16.0 if quant[2] else 32.0 if quant[3] else float(quant[1]) + 0.85
    return round(parameters * bits / 8)
