"""The rows of /fleet/status, and that snapshots are made anew only where something changed."""

from herd.fleet.registry import AttemptResult
from herd_node.protocol import wire
from tests.fleet.build import HOST, KEY, OLLAMA, backend, beat, fresh, join, model, online, start


def test_a_row_has_every_field_of_the_contract_and_the_routers_own_counts():
    registry = online(
        model("llama3:8b", context_tokens=4096, slots_taken=2),
        model("tools"),
        model("other", "cold", weights="w", slots_taken=1),
        in_flight={"llama3:8b": 5},
        cpu=wire.Cpu(percent=12.5),
        backends=(backend(version="0.12.0"),),
    )
    registry.end_attempt(start(registry, 1.0), 2.0, AttemptResult(ok=False, cancelled=True, settle_s=9.0))
    start(registry, 2.0)
    registry.set_waiting({"llama3:8b": 3, "tools": 1, "elsewhere": 7})
    (row,) = registry.nodes_for_status(4.5)
    told = row.as_dict()
    assert list(told) == [
        "node_id", "status", "reason", "agent_version", "last_seen_s", "hardware", "cpu", "memory", "disk",
        "heat", "gpus", "backends", "models", "in_flight", "waiting", "settling", "reported",
    ]  # fmt: skip
    assert (told["status"], told["last_seen_s"], told["in_flight"], told["settling"]) == ("online", 4.5, 1, 1)
    assert told["waiting"] == 4
    assert told["reported"] == {"in_flight_by_agent": 5, "slots_taken": 3}
    assert told["cpu"] == {"percent": 12.5, "load_1m": None}
    assert told["backends"] == (
        {"id": OLLAMA, "kind": "ollama", "version": "0.12.0", "ready": True, "reason": None},
    )
    assert [tuple(one.values()) for one in told["models"]] == [
        ("llama3:8b", "hot", 5_000_000_000, 4096, 2, 1),
        ("tools", "hot", 5_000_000_000, 4096, 2, 0),
        ("other", "cold", 5_000_000_000, None, 1, 0),
    ]


def test_waiting_by_node_counts_when_the_queue_knows_it():
    registry = online(model())
    registry.set_waiting({"llama3:8b": 3}, {"attic": 2})
    assert registry.nodes_for_status(0.0)[0].waiting == 2


def test_rows_come_by_node_id_and_say_why_a_node_is_not_online():
    registry = fresh()
    join(registry, beat("b"), 0.0)
    registry.on_beat(beat("a", agent_id="e" * 16), HOST, 0.0)
    assert [(row.node_id, row.status, row.reason) for row in registry.nodes_for_status(0.0)] == [
        ("a", "offline", "not probed yet"),
        ("b", "online", None),
    ]


def test_a_snapshot_is_the_same_object_until_something_changed():
    registry = online(model())
    first = registry.snapshot(1.0)
    assert registry.snapshot(2.0) is first
    version = registry.version
    registry.set_waiting({})
    assert registry.snapshot(2.0) is first
    registry.set_waiting({"llama3:8b": 1})
    assert registry.version > version
    assert registry.snapshot(2.0).waiting == {"llama3:8b": 1}
    assert registry.snapshot(2.0).nodes["attic"] is first.nodes["attic"]


def test_a_beat_without_news_leaves_the_instances_as_they_are():
    registry = online(model(expires_in_s=300.0, slots_taken=0))
    before = registry.snapshot(1.0).nodes["attic"]
    registry.on_beat(beat("attic", model(expires_in_s=295.0, slots_taken=1)), HOST, 5.0)
    after = registry.snapshot(5.0).nodes["attic"]
    assert after is not before
    assert after.last_beat_s == 5.0
    assert after.instances[0] is before.instances[0]


def test_work_is_seen_in_the_view_and_leaves_the_rest_of_it_alone():
    registry = online(model())
    before = registry.snapshot(1.0).nodes["attic"]
    start(registry, 2.0)
    after = registry.snapshot(2.0).nodes["attic"]
    assert (len(after.instances[0].running), after.busy_share.busy_now, after.last_chosen_s) == (1, True, 2.0)
    assert after == before._replace(
        instances=after.instances, busy_share=after.busy_share, last_chosen_s=after.last_chosen_s
    )
    registry.on_beat(beat("attic", model(), draining=True), HOST, 3.0)
    assert registry.snapshot(3.0).nodes["attic"].status == "draining"


def test_a_snapshot_that_somebody_holds_does_not_change():
    registry = online(model())
    held = registry.snapshot(1.0)
    copy = held._replace(
        nodes=dict(held.nodes),
        listing=dict(held.listing),
        stats=dict(held.stats),
        last_sent_s=dict(held.last_sent_s),
    )
    token = start(registry, 2.0)
    registry.first_record(token, 3.0)
    registry.end_attempt(token, 4.0, AttemptResult(ok=True, completion_tokens=10))
    registry.on_beat(beat("attic", model("new", weights="w")), HOST, 5.0)
    registry.snapshot(5.0)
    assert held == copy


def test_holders_name_the_views_of_the_same_snapshot():
    registry = online(model())
    start(registry, 1.0)
    snapshot = registry.snapshot(1.0)
    ((node, instance),) = snapshot.holders["llama3:8b"]
    assert node is snapshot.nodes["attic"]
    assert instance is node.instances[0] is registry.instance("attic", KEY)
