"""The Ollama backend against a scripted server that replays recordings: polls, shows, loads, warm memory."""

from __future__ import annotations

import asyncio

import pytest

from herd_node.backends.base import LoadFailed, Owner
from herd_node.backends.ollama import SHOWS_AT_ONCE, SHOWS_FOR_S, Ollama, pack_options
from herd_node.backends.warm import WARM_FOR_S, WarmMemory
from herd_node.runtime.clock import ManualClock
from tests.backends.replaying import Answer, Replaying, made, means, recorded, replaying
from tests.backends.test_ollama_lists import JINJA, SMOL

SHOWS = {
    "smollm2:135m": "show",
    "smol-tools:latest": "show-tools",
    "smol-think:latest": "show-think",
    "smol-fim:latest": "show-fim",
    "smol-jinja:latest": "show-jinja",
    "smol-embed:latest": "show-embed",
}


async def show(asked) -> Answer:
    return recorded(f"ollama/{SHOWS[asked.body['model']]}")


def ollama(ps: str = "ps-empty", **more) -> dict[str, object]:
    return {
        "/api/version": recorded("ollama/version"),
        "/api/tags": recorded("ollama/tags"),
        "/api/ps": recorded(f"ollama/{ps}"),
        "/api/show": show,
        "/api/generate": recorded("ollama/generate-empty-load"),
        "/api/embed": recorded("ollama/embed-empty-list"),
        **more,
    }


def states(backend: Ollama) -> dict[str, str]:
    return {model.name: model.state for model in backend.reading.models}


async def test_a_poll_reads_version_lists_and_shows() -> None:
    async with replaying(ollama("ps-one")) as server, means() as given:
        backend = Ollama(server.origin, given)
        reading = await backend.poll(0.0)
    assert (reading.kind, reading.version, reading.ready) == ("ollama", "0.99.0", True)
    assert reading.max_loaded == 3
    jinja = backend.model("smol-jinja")
    assert jinja is not None
    assert (jinja.weights, jinja.capabilities) == (JINJA, ("completion", "thinking", "tools"))
    assert states(backend)["smol-tools:latest"] == "hot"
    assert {model.backend for model in reading.models} == {f"ollama-{backend.origin.port}"}


async def test_names_are_served_by_their_canonical_form() -> None:
    async with replaying(ollama()) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
    assert backend.upstream_model("smol-tools") == "smol-tools:latest"
    assert backend.upstream_model("nobody") is None
    facts = backend.facts("smollm2:135m")
    assert facts is not None
    assert facts.digest == "b1d9b48b0bb876cf6d0dd3268f3aa6f2f7077be88c25bbccc036d82e24a9a1ee"
    assert facts.embedding_length == 576


async def test_show_is_asked_once_a_digest() -> None:
    async with replaying(ollama()) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        await backend.poll(5.0)
        assert server.paths().count("/api/show") == len(SHOWS)
        assert server.paths().count("/api/ps") == 2


async def test_three_hundred_models_are_shown_over_several_polls_loaded_ones_first() -> None:
    clock = ManualClock()
    listed = [{"name": f"m{number}:latest", "digest": f"d{number}", "size": 1} for number in range(300)]

    async def slow_show(asked) -> Answer:
        clock.advance(SHOWS_FOR_S / 8)
        return recorded("ollama/show")

    answers = ollama()
    answers.update({
        "/api/tags": made({"models": listed}),
        "/api/ps": made({"models": [{"name": "m299:latest", "digest": "d299"}]}),
        "/api/show": slow_show,
    })  # fmt: skip
    async with replaying(answers) as server, means(clock) as given:
        backend = Ollama(server.origin, given)
        reading = await backend.poll(0.0)
        first = server.paths().count("/api/show")
        assert SHOWS_AT_ONCE <= first <= 16
        assert len(reading.models) == 300
        last = backend.model("m299")
        assert last is not None
        assert (last.weights, last.state) == (SMOL, "hot")
        assert {"completion", "embedding"} <= set(reading.models[200].capabilities)  # not known yet
        await backend.poll(5.0)
        assert server.paths().count("/api/show") > first


async def test_a_broken_model_is_asked_once_and_described_by_tags() -> None:
    answers = ollama()
    answers["/api/show"] = made({"error": "invalid file magic"}, 500)
    async with replaying(answers) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        reading = await backend.poll(5.0)
        assert server.paths().count("/api/show") == len(SHOWS)
    assert reading.ready
    assert reading.models[0].capabilities == ("embedding",)
    assert reading.models[0].weights is None


async def test_the_process_tree_outranks_ps_and_names_the_slots() -> None:
    seen: list[tuple[tuple[str, ...], ...]] = [(("ollama", "runner", "--model", f"/b/{SMOL}", "-np", "4"),)]

    name = ["ollama"]

    def owner_of(origin):
        return Owner(1, name[0], seen[0])

    async with replaying(ollama("ps-one")) as server, means(owner_of=owner_of, num_parallel=2) as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        smol, jinja, embed = (backend.model(name) for name in ("smollm2:135m", "smol-jinja", "smol-embed"))
        assert smol is not None
        assert jinja is not None
        assert embed is not None
        assert (smol.state, smol.slots, jinja.slots, embed.slots) == ("hot", 4, 2, 1)
        seen[0] = ()
        name[0] = "docker-proxy"  # it only passes on: what ps says must do
        await backend.poll(5.0)
        assert states(backend)["smollm2:135m"] == "hot"
        name[0] = "Ollama.exe"
        await backend.poll(10.0)
        assert states(backend)["smollm2:135m"] == "warm"  # its file is still in the page cache


async def test_an_unloaded_model_is_warm_for_half_an_hour_under_all_its_names() -> None:
    clock = ManualClock()
    async with replaying(ollama("ps-one")) as server, means(clock) as given:
        backend = Ollama(server.origin, given)
        await backend.poll(clock.now_s())
        server.answers["/api/ps"] = recorded("ollama/ps-empty")
        clock.advance(5)
        await backend.poll(clock.now_s())
        clock.advance(60)
        await backend.poll(clock.now_s())
        tools = backend.model("smol-tools")
        assert tools is not None
        assert (tools.state, tools.unloaded_s_ago) == ("warm", 60.0)
        assert states(backend)["smol-jinja:latest"] == "cold"
        clock.advance(WARM_FOR_S)
        await backend.poll(clock.now_s())
        assert states(backend)["smol-tools:latest"] == "cold"


async def test_warm_memory_survives_a_restart_of_the_agent() -> None:
    clock = ManualClock()
    async with replaying(ollama("ps-one")) as server:
        async with means(clock) as given:
            backend = Ollama(server.origin, given)
            await backend.poll(clock.now_s())
            server.answers["/api/ps"] = recorded("ollama/ps-empty")
            await backend.poll(clock.now_s())
            assert given.warm.changed
            kept = given.warm.dump()
        clock.advance(100)
        async with means(clock, warm=WarmMemory.parse(kept)) as given:
            backend = Ollama(server.origin, given)
            await backend.poll(clock.now_s())
            smol = backend.model("smollm2:135m")
            assert smol is not None
            assert (smol.state, smol.unloaded_s_ago) == ("warm", 100.0)


@pytest.mark.parametrize(
    ("path", "answer", "reason"),
    [
        (
            "/api/ps",
            recorded("ollama/queue-full"),
            "/api/ps answers 503: server busy, please try again.  maximum",
        ),
        ("/api/tags", Answer(200, b"no json"), "/api/tags answers 200"),
        ("/api/version", Answer(404, b"404 page not found"), "/api/version answers 404"),
    ],
)
async def test_an_answer_that_does_not_fit_is_not_ready_and_asks_for_detection(path, answer, reason) -> None:
    async with replaying(ollama("ps-one")) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        server.answers[path] = answer
        reading = await backend.poll(5.0)
    assert not reading.ready
    assert reading.detect_again
    assert reason in (reading.reason or "")
    assert len(reading.models) == len(SHOWS)


async def test_a_hot_model_loaded_with_these_options_costs_no_call() -> None:
    async with replaying(ollama("ps-one")) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        await backend.ensure_loaded("smollm2:135m", {})  # hot, but nobody knows with which options
        assert server.paths().count("/api/generate") == 1
        await backend.ensure_loaded("smollm2:135m", {})
        await backend.ensure_loaded("smol-tools", {})  # the same runner
        assert server.paths().count("/api/generate") == 1
        await backend.ensure_loaded("smollm2:135m", {"num_ctx": 4096})
        assert server.paths().count("/api/generate") == 2
        assert server.asked[-2].body == {
            "model": "smollm2:135m", "stream": False, "options": {"num_ctx": 4096},
        }  # fmt: skip


async def test_a_runner_that_somebody_else_reloaded_is_looked_at_again() -> None:
    async with replaying(ollama("ps-one")) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        await backend.ensure_loaded("smollm2:135m", {})
        other = {**_ps_entry(), "context_length": 8192}
        server.answers["/api/ps"] = made({"models": [other]})
        await backend.poll(5.0)
        await backend.ensure_loaded("smollm2:135m", {})
        assert server.paths().count("/api/generate") == 2


def _ps_entry() -> dict[str, object]:
    import orjson

    return orjson.loads(recorded("ollama/ps-one").body)["models"][0]


async def test_an_embedding_model_is_loaded_by_an_empty_embed() -> None:
    async with replaying(ollama()) as server, means() as given:
        backend = Ollama(server.origin, given)
        await backend.poll(0.0)
        await backend.ensure_loaded("smol-embed", {"num_thread": 2, "temperature": 1})
        asked = [asked.body for asked in server.asked if asked.path == "/api/embed"]
    assert asked == [{"model": "smol-embed:latest", "input": [], "options": {"num_thread": 2}}]


class SlowLoad:
    """A load that ends when the test says so, and tells whether its client hung up."""

    def __init__(self, answer: Answer) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()
        self.answer = answer

    async def __call__(self, asked) -> Answer:
        self.begun.set()
        await self.go.wait()
        return self.answer


async def loading_backend(server: Replaying, given) -> Ollama:
    backend = Ollama(server.origin, given)
    await backend.poll(0.0)
    return backend


async def test_all_who_wait_share_one_load_and_leaving_does_not_end_it() -> None:
    load = SlowLoad(recorded("ollama/generate-empty-load"))
    changes: list[str] = []
    answers = ollama(**{"/api/generate": load})
    async with replaying(answers) as server, means(on_change=lambda: changes.append("changed")) as given:
        backend = await loading_backend(server, given)
        waiters = [asyncio.create_task(backend.ensure_loaded("smollm2:135m", {})) for _ in range(3)]
        await load.begun.wait()
        assert states(backend)["smol-tools:latest"] == "loading"
        waiters[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiters[0]
        server.answers["/api/ps"] = recorded("ollama/ps-one")
        load.go.set()
        await asyncio.gather(*waiters[1:])
        assert server.paths().count("/api/generate") == 1
        assert states(backend)["smollm2:135m"] == "hot"
        assert states(backend)["smol-jinja:latest"] == "cold"
        assert changes == ["changed", "changed"]


async def test_a_failed_load_tells_all_who_wait_what_ollama_said() -> None:
    load = SlowLoad(recorded("ollama/runner-sigill"))
    async with replaying(ollama(**{"/api/generate": load})) as server, means() as given:
        backend = await loading_backend(server, given)
        waiters = [asyncio.create_task(backend.ensure_loaded("smollm2:135m", {})) for _ in range(2)]
        await load.begun.wait()
        load.go.set()
        failures = await asyncio.gather(*waiters, return_exceptions=True)
        assert [str(failure) for failure in failures] == [
            "llama-server process has terminated: signal: illegal instruction"
        ] * 2
        assert [failure.status for failure in failures if isinstance(failure, LoadFailed)] == [500, 500]
        assert states(backend)["smollm2:135m"] == "cold"
        server.answers["/api/generate"] = recorded("ollama/generate-empty-load")
        await backend.ensure_loaded("smollm2:135m", {})  # the next one tries again


async def test_an_unknown_model_cannot_be_loaded() -> None:
    async with replaying(ollama()) as server, means() as given:
        backend = await loading_backend(server, given)
        with pytest.raises(LoadFailed, match="model 'nobody' not found") as refused:
            await backend.ensure_loaded("nobody", {})
    assert refused.value.status == 404


async def test_closing_the_agent_ends_a_load_in_progress() -> None:
    load = SlowLoad(recorded("ollama/generate-empty-load"))
    async with replaying(ollama(**{"/api/generate": load})) as server:
        async with means() as given:
            backend = await loading_backend(server, given)
            waiter = asyncio.create_task(backend.ensure_loaded("smollm2:135m", {}))
            await load.begun.wait()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        load.go.set()


def test_equal_loads_are_equal_bytes_and_request_options_do_not_count() -> None:
    assert pack_options({"num_ctx": 4096, "num_gpu": 0}) == pack_options(
        {"num_gpu": 0, "num_ctx": 4096, "top_k": 3}
    )
    assert pack_options({"num_ctx": None}) == pack_options({}) == b"{}"
    assert pack_options({"shift": False}) != pack_options({})


async def test_ollama_loads_are_counted_by_the_environment_of_the_agent() -> None:
    async with replaying(ollama()) as server, means(max_loaded=5, gpu_count=2) as given:
        assert (await Ollama(server.origin, given).poll(0.0)).max_loaded == 5
    async with replaying(ollama()) as server, means(gpu_count=2) as given:
        assert (await Ollama(server.origin, given).poll(0.0)).max_loaded == 6
