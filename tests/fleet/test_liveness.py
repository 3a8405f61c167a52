"""When a node is online, degraded, offline: by receipt time, probes, failed calls, refused signatures."""

import pytest

from herd.fleet.events import NodeChanged
from herd.fleet.registry import AttemptResult
from herd_node.protocol import wire
from tests.fleet.build import AGENT, HOST, KEY, beat, fresh, join, model, online, start, status

OTHER_BOOT = "c" * 16


def sweep_until(registry, from_s, to_s):
    now_s = from_s
    while now_s < to_s:
        now_s = min(now_s + 1.0, to_s)
        registry.sweep(now_s)


def test_a_new_node_is_offline_until_its_probe_succeeded():
    registry = fresh()
    outcome = registry.on_beat(beat(), HOST, 0.0)
    assert outcome == ("unreachable", "not probed yet", True, False)
    (target,) = registry.probes_due(0.0)
    assert target == ("attic", HOST, 11436, "b" * 16, f"attic/{AGENT}")
    assert registry.probes_due(0.0) == []
    registry.on_probe("attic", True, 0.01, target=target)
    assert status(registry) == "online"
    assert registry.on_beat(beat(), HOST, 5.0) == ("online", None, False, False)


def test_a_node_that_cannot_be_called_says_what_to_open():
    registry = fresh()
    registry.on_beat(beat(), HOST, 0.0)
    registry.on_probe("attic", False, 2.0, "connection timed out")
    reason = registry.on_beat(beat(), HOST, 5.0).reason
    assert reason is not None
    assert f"{HOST}:11436" in reason
    assert "firewall" in reason
    assert "connection timed out" in reason


def test_a_node_on_this_machine_is_not_told_about_firewalls():
    registry = fresh()
    registry.on_beat(beat(), "::1", 0.0)
    registry.on_probe("attic", False, 2.0, "refused")
    assert (
        registry.on_beat(beat(), "::1", 5.0).reason
        == "unreachable: it does not answer at [::1]:11436 (refused)"
    )


def test_probes_of_an_unreachable_node_come_after_1_2_4_up_to_30_s():
    registry = online(model())
    registry.on_connect_failed("attic", 0.0, "refused")
    waits, last_s = [], 0.0
    for half_seconds in range(1, 250):
        now_s = half_seconds / 2
        registry.on_beat(beat("attic", model()), HOST, now_s)
        for target in registry.probes_due(now_s):
            waits.append(now_s - last_s)
            last_s = now_s
            registry.on_probe(target.node_id, False, now_s, target=target)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_probe_that_nobody_answered_for_is_handed_out_again():
    registry = fresh()
    registry.on_beat(beat(), HOST, 0.0)
    assert len(registry.probes_due(0.0)) == 1
    registry.on_beat(beat(), HOST, 25.0)
    assert registry.probes_due(29.0) == []
    assert len(registry.probes_due(30.0)) == 1


def test_beats_alone_do_not_bring_a_node_back_after_a_failed_connection():
    registry = online(model())
    registry.on_connect_failed("attic", 1.0, "connection refused")
    for now_s in range(5, 60, 5):
        assert registry.on_beat(beat("attic", model()), HOST, now_s).reply_state == "unreachable"
        assert status(registry) == "offline"
    (target,) = registry.probes_due(60.0)
    registry.on_probe("attic", True, 60.0, target=target)
    assert status(registry) == "online"


@pytest.mark.parametrize(
    ("silence_s", "expected"),
    [
        (14.9, "online"),
        (15.0, "online"),
        (15.1, "degraded"),
        (30.0, "degraded"),
        (30.1, "offline"),
        (500.0, "offline"),
    ],
)
def test_silence_degrades_after_15_s_and_ends_after_30_s(silence_s, expected):
    registry = online(model())
    sweep_until(registry, 0.0, silence_s)
    assert status(registry, now_s=silence_s) == expected


def test_a_late_beat_heals_a_degraded_node_and_a_silent_one_is_probed_first():
    registry = online(model())
    sweep_until(registry, 0.0, 20.0)
    assert registry.on_beat(beat("attic", model()), HOST, 20.0).reply_state == "online"
    assert status(registry) == "online"
    sweep_until(registry, 20.0, 51.0)
    assert registry.probes_due(51.0) == [], "nobody probes a node that does not beat"
    outcome = registry.on_beat(beat("attic", model()), HOST, 52.0)
    assert outcome == ("unreachable", "not probed yet", True, False)
    join(registry, beat("attic", model()), 52.0)
    assert status(registry) == "online"


def test_a_process_that_stood_still_does_not_take_its_nodes_for_dead():
    registry = online(model())
    sweep_until(registry, 0.0, 3.0)
    registry.sweep(63.0)
    assert status(registry) == "online"
    sweep_until(registry, 63.0, 77.0)
    assert status(registry) == "online"
    sweep_until(registry, 77.0, 80.0)
    assert status(registry) == "degraded"


def test_a_probe_that_succeeds_while_the_node_is_silent_does_not_bring_it_online():
    registry = online(model())
    registry.on_connect_failed("attic", 0.0, "refused")
    (target,) = registry.probes_due(1.0)
    sweep_until(registry, 0.0, 31.0)
    registry.on_probe("attic", True, 31.0, target=target)
    assert status(registry) == "offline"


def test_another_boot_is_probed_before_it_is_online_and_running_work_is_kept():
    registry = online(model())
    token = start(registry, 1.0)
    outcome = registry.on_beat(beat("attic", model(), boot=OTHER_BOOT), HOST, 2.0)
    assert outcome.needs_probe
    assert status(registry) == "offline"
    assert len(registry.instance("attic", KEY).running) == 1
    (target,) = registry.probes_due(2.0)
    assert target.boot == OTHER_BOOT
    registry.on_probe("attic", True, 2.0, target=target)
    assert status(registry) == "online"
    registry.end_attempt(token, 3.0, AttemptResult(ok=False))


def test_another_address_is_probed_there_and_running_work_is_kept():
    registry = online(model())
    start(registry, 1.0)
    moved = beat("attic", model(), gateway=wire.Gateway(port=11436, addresses=("10.0.0.77",)))
    assert registry.on_beat(moved, "::ffff:10.0.0.77", 2.0).needs_probe
    assert registry.address("attic") == ("10.0.0.77", 11436)
    (target,) = registry.probes_due(2.0)
    assert (target.host, target.port) == ("10.0.0.77", 11436)
    registry.on_probe("attic", True, 2.0, target=target)
    assert status(registry) == "online"
    assert len(registry.instance("attic", KEY).running) == 1


def test_another_port_is_another_address():
    registry = online(model())
    outcome = registry.on_beat(
        beat("attic", model(), gateway=wire.Gateway(port=5000, addresses=(HOST,))), HOST, 2.0
    )
    assert outcome.needs_probe
    assert registry.address("attic") == (HOST, 5000)


def test_a_probe_of_the_former_boot_proves_nothing():
    registry = fresh()
    registry.on_beat(beat(), HOST, 0.0)
    (former,) = registry.probes_due(0.0)
    registry.on_beat(beat(boot=OTHER_BOOT), HOST, 1.0)
    (target,) = registry.probes_due(1.0)
    registry.on_probe("attic", True, 1.1, target=former)
    assert status(registry) == "offline"
    registry.on_probe("attic", True, 1.2, target=target)
    assert status(registry) == "online"


def test_a_late_failure_at_the_former_address_says_nothing_about_the_new_one():
    registry = online(model())
    registry.on_connect_failed("attic", 1.0, "timed out", address=("10.0.0.99", 11436))
    assert status(registry) == "online"
    registry.on_connect_failed("attic", 1.0, "timed out", address=(HOST, 11436))
    assert status(registry) == "offline"


def test_a_relay_does_not_become_the_node():
    registry = fresh()
    outcome = registry.on_beat(beat(), "10.0.0.66", 0.0)
    assert outcome.reply_state == "unreachable"
    assert not outcome.needs_probe
    assert "10.0.0.66" in (outcome.reason or "")
    assert registry.probes_due(100.0) == []
    registry.on_probe("attic", True, 1.0)
    assert status(registry) == "offline"
    join(registry, beat(), 5.0)
    assert status(registry) == "online"
    registry.on_beat(beat(), "10.0.0.66", 10.0)
    assert status(registry) == "offline"


def test_an_agent_on_the_routers_machine_may_beat_from_loopback():
    registry = fresh()
    join(registry, beat(), 0.0, host="127.0.0.1")
    assert status(registry) == "online"
    assert registry.address("attic") == ("127.0.0.1", 11436)


def test_a_second_agent_under_the_same_node_id_is_refused_and_changes_nothing():
    registry = online(model())
    before, version = registry.snapshot(10.0), registry.version
    outcome = registry.on_beat(beat("attic", agent_id="d" * 16, boot=OTHER_BOOT), "10.0.0.9", 10.0)
    assert outcome.conflict
    assert "--node-id" in (outcome.reason or "")
    assert registry.snapshot(10.0) is before
    assert registry.version == version
    assert registry.drain_events() == []
    assert registry.agent("attic") == (AGENT, "b" * 16, "0.1.0")


def test_a_node_id_that_nobody_was_heard_under_for_30_s_may_be_taken_over():
    registry = online(model())
    sweep_until(registry, 0.0, 30.0)
    replaced = beat("attic", model(), agent_id="d" * 16, boot=OTHER_BOOT)
    assert registry.on_beat(replaced, HOST, 29.9).conflict
    outcome = registry.on_beat(replaced, HOST, 30.0)
    assert (outcome.conflict, outcome.needs_probe) == (False, True)
    assert registry.agent("attic")[0] == "d" * 16


def test_draining_is_sticky_for_the_boot():
    registry = online(model())
    assert registry.on_beat(beat("attic", model(), draining=True), HOST, 1.0).reply_state == "draining"
    assert registry.on_beat(beat("attic", model()), HOST, 6.0).reply_state == "draining"
    assert status(registry) == "draining"
    registry.on_connect_failed("attic", 7.0, "refused")
    registry.on_beat(beat("attic", model()), HOST, 8.0)
    assert status(registry) == "draining"
    join(registry, beat("attic", model(), boot=OTHER_BOOT), 9.0)
    assert status(registry) == "online"


def test_a_refused_signature_stops_calls_until_the_next_beat():
    registry = online(model())
    registry.on_stale_auth("attic", 1.0)
    assert status(registry) == "offline"
    assert registry.probes_due(1.0) == []
    assert registry.on_beat(beat("attic", model()), HOST, 5.0).reply_state == "online"
    assert status(registry) == "online"


def test_three_refused_signatures_within_a_minute_make_a_node_unreachable():
    registry = online(model())
    for now_s in (1.0, 20.0, 60.9):
        registry.on_beat(beat("attic", model()), HOST, now_s)
        registry.on_stale_auth("attic", now_s)
    assert registry.on_beat(beat("attic", model()), HOST, 61.0).reply_state == "unreachable"
    (target,) = registry.probes_due(61.9)
    registry.on_probe("attic", True, 62.0, target=target)
    assert status(registry) == "online"


def test_refused_signatures_far_apart_are_forgiven():
    registry = online(model())
    for now_s in (1.0, 20.0, 61.0, 90.0):
        registry.on_stale_auth("attic", now_s)
        assert registry.on_beat(beat("attic", model()), HOST, now_s).reply_state == "online"


def test_a_change_of_state_is_told_once():
    registry = online(model())
    registry.on_connect_failed("attic", 1.0, "refused")
    registry.on_connect_failed("attic", 1.1, "refused")
    told = [event for event in registry.drain_events() if isinstance(event, NodeChanged)]
    assert [event.status for event in told] == ["offline"]
    assert registry.drain_events() == []


def test_an_offline_node_stays_listed_with_what_it_had():
    registry = online(model())
    sweep_until(registry, 0.0, 3600.0)
    snapshot = registry.snapshot(3600.0)
    assert not snapshot.any_online
    ((node, instance),) = snapshot.holders["llama3:8b"]
    assert (node.status, node.reason, instance.key) == ("offline", "no heartbeat for more than 30 s", KEY)
