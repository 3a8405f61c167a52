"""Readings in, heartbeat out."""

from __future__ import annotations

from herd_node.protocol.wire import Model, parse_heartbeat, render_heartbeat
from herd_node.report import MAX_MODELS, BackendState, Host, Self, heartbeat, models, standing

ME = Self("n", "0" * 16, "a" * 16, "0.1.0", 5.0, 11436)


def state(backend: str, *listed: Model, ready: bool = True, reason: str | None = None) -> BackendState:
    return BackendState(backend, "ollama", "1", ready, reason, None, listed)


def test_what_is_reported_is_what_the_router_reads() -> None:
    beat = heartbeat(
        ME,
        seq=7,
        draining=True,
        addresses=("192.0.2.1",),
        host=Host(),
        backends=[state("o", Model(name="m", backend="o", state="hot"), ready=False, reason="x" * 300)],
        in_flight={"m": 2},
    )
    read = parse_heartbeat(render_heartbeat(beat))
    assert read == beat
    assert (read.seq, read.draining, read.in_flight) == (7, True, {"m": 2})
    assert len(read.backends[0].reason or "") == 256


def test_what_a_backend_can_do_with_its_models_is_told() -> None:
    one = state("o")._replace(manages=("pull-gguf", "delete"), disk_free_bytes=7)
    beat = heartbeat(ME, seq=1, draining=False, addresses=(), host=Host(), backends=[one], in_flight={})
    (read,) = parse_heartbeat(render_heartbeat(beat)).backends
    assert (read.manages, read.disk_free_bytes) == (("pull-gguf", "delete"), 7)


def test_a_name_that_two_backends_have_belongs_to_the_first_that_is_ready() -> None:
    first, second = Model(name="M:latest", backend="a"), Model(name="m", backend="b")
    assert models([state("a", first), state("b", second)]) == (first,)
    assert models([state("a", first, ready=False), state("b", second)]) == (second,)


def test_an_alias_that_another_model_has_taken_is_left_out() -> None:
    listed = models(
        [
            state("a", Model(name="m", backend="a")),
            state("b", Model(name="n", aliases=("M", "o"), backend="b")),
        ]
    )
    assert [(model.name, model.aliases) for model in listed] == [("m", ()), ("n", ("o",))]


def test_names_that_no_router_would_take_are_not_sent() -> None:
    odd = ["", "a b", "<x>", "y" * 201, "é"]
    assert [
        model.name for model in models([state("a", *(Model(name=name, backend="a") for name in odd))])
    ] == ["é"]


def test_of_too_many_models_the_loaded_ones_stay() -> None:
    many = [Model(name=f"m{n}", backend="a") for n in range(MAX_MODELS)]
    kept = models([state("a", *many, Model(name="hot", backend="a", state="hot"))])
    assert len(kept) == MAX_MODELS
    assert "hot" in {model.name for model in kept}


def test_only_what_must_be_told_at_once_changes_the_standing() -> None:
    cold = Model(name="m", backend="a", expires_in_s=3.0)
    still = Model(name="m", backend="a", expires_in_s=2.0)
    hot = Model(name="m", backend="a", state="hot")
    assert standing([state("a", cold)]) == standing([state("a", still)])
    assert standing([state("a", cold)]) != standing([state("a", hot)])
    assert standing([state("a", cold)]) != standing([state("a", cold, ready=False)])
    assert standing([state("a", cold)]) != standing([state("a")])
