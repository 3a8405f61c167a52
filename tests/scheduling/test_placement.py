"""Where a model goes: among the nodes that can, the one with the most free memory that it fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.scheduling.placement import DISK_REST_BYTES, Site, place, site
from herd_node.protocol import wire
from tests.scheduling.build import node

GB = 1_000_000_000
PULL = frozenset({"pull"})


def at(
    node_id: str, free: int | None = 8 * GB, *, memory: int | None = 16 * GB, disk: int | None = 500 * GB
) -> Site:
    return Site(node_id, PULL, memory, free, disk)


def test_the_most_free_memory_wins_and_the_id_breaks_ties() -> None:
    assert place([at("a", 4 * GB), at("c", 9 * GB), at("b", 9 * GB)], PULL, 2 * GB, "pull it").node_id == "b"


def test_who_has_room_comes_before_who_would_have_to_evict() -> None:
    tight = at("tight", 5 * GB, memory=64 * GB)
    roomy = at("roomy", 6 * GB)
    assert place([tight, roomy], PULL, 5 * GB, "pull it").node_id == "roomy"
    assert place([tight], PULL, 5 * GB, "pull it").node_id == "tight"


@pytest.mark.parametrize(
    "too_small", [at("x", memory=4 * GB), at("x", disk=5 * GB), at("x", disk=5 * GB + DISK_REST_BYTES - 1)]
)
def test_what_does_not_fit_at_all_is_said_with_the_size(too_small: Site) -> None:
    choice = place([too_small], PULL, 5 * GB, "pull it")
    assert choice.node_id is None
    assert choice.why_not == "no node has the memory and the disk for 5.0 GB"


def test_nobody_who_can_is_another_sentence() -> None:
    assert place([at("a")], frozenset({"pull-gguf"}), None, "pull 'x'").why_not.endswith("can pull 'x'")
    assert place([], PULL, None, "pull 'x'").node_id is None


def test_what_is_not_known_excludes_nobody() -> None:
    assert place([at("a", None, memory=None, disk=None)], PULL, 900 * GB, "pull it").node_id == "a"
    assert place([at("a", memory=1)], PULL, None, "pull it").node_id == "a"


sites = st.builds(
    Site,
    st.text("abc", min_size=1, max_size=3),
    st.sampled_from([PULL, frozenset[str](), frozenset({"pull-gguf"})]),
    st.none() | st.integers(0, 64 * GB),
    st.none() | st.integers(0, 64 * GB),
    st.none() | st.integers(0, 900 * GB),
)


@given(st.lists(sites, max_size=6, unique_by=lambda one: one.node_id), st.none() | st.integers(1, 80 * GB))
def test_the_chosen_one_can_and_it_fits_there(found: list[Site], size_bytes: int | None) -> None:
    choice = place(found, PULL, size_bytes, "pull it")
    assert (choice.node_id is None) == bool(choice.why_not)
    chosen = [one for one in found if one.node_id == choice.node_id and one.offers & PULL]
    if choice.node_id is None or size_bytes is None:
        return
    assert any(one.memory_bytes is None or one.memory_bytes >= size_bytes for one in chosen)
    assert all(one.free_disk_bytes is None or one.free_disk_bytes >= size_bytes for one in chosen)


def beat(*backends: wire.Backend, disk: int | None = None) -> wire.Heartbeat:
    return wire.Heartbeat(
        node_id="n",
        agent_id="0" * 16,
        boot="0" * 16,
        agent_version="1",
        seq=1,
        interval_s=5.0,
        gateway=wire.Gateway(port=1),
        backends=backends,
        disk=wire.Disk(free_bytes=disk),
    )


def test_a_site_is_made_of_what_its_ready_backends_offer() -> None:
    backends = (
        wire.Backend(id="o", ready=True, manages=("pull", "copy")),
        wire.Backend(id="e", ready=True, manages=("pull-gguf",), disk_free_bytes=7),
        wire.Backend(id="x", ready=False, manages=("push",)),
    )
    found = site(node("n"), beat(*backends, disk=9))
    assert found is not None
    assert (found.offers, found.free_disk_bytes) == (frozenset({"pull", "copy", "pull-gguf"}), 7)
    other = site(node("n"), beat(disk=9))
    assert other is not None
    assert other.free_disk_bytes == 9


def test_nothing_goes_to_a_node_that_is_not_there() -> None:
    assert site(node("n", status="offline"), beat()) is None
