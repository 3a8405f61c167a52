"""The node state machine: every pair of state and cause, written out a second time."""

import pytest

from herd.fleet.node import CAUSES, STATUSES, TABLE, next_status

# pending, online, degraded, offline, draining
EXPECTED = {
    "beat": ("pending", "online", "online", "online", "draining"),
    "beat_unproven": ("pending", "offline", "offline", "offline", "draining"),
    "drain_beat": ("pending", "draining", "draining", "draining", "draining"),
    "new_boot": ("pending", "offline", "offline", "offline", "offline"),
    "new_address": ("pending", "offline", "offline", "offline", "draining"),
    "bad_address": ("pending", "offline", "offline", "offline", "offline"),
    "beat_late_15s": ("pending", "degraded", "degraded", "offline", "draining"),
    "beat_late_30s": ("pending", "offline", "offline", "offline", "offline"),
    "connect_failed": ("pending", "offline", "offline", "offline", "offline"),
    "call_refused": ("pending", "offline", "offline", "offline", "draining"),
    "call_refused_thrice": ("pending", "offline", "offline", "offline", "offline"),
    "probe_ok": ("pending", "online", "degraded", "online", "draining"),
    "probe_failed": ("pending", "offline", "offline", "offline", "offline"),
    "approved": ("offline", "online", "degraded", "offline", "draining"),
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("status", STATUSES)
def test_every_state_and_cause_leads_where_the_table_says(status, cause):
    place = ("pending", "online", "degraded", "offline", "draining").index(status)
    assert next_status(status, cause) == EXPECTED[cause][place]


def test_every_cause_has_one_row_and_somebody_who_may_cause_it():
    assert [row.cause for row in TABLE] == list(CAUSES)
    assert {row.who for row in TABLE} == {"agent", "router", "admin"}


def test_only_an_admin_leads_a_node_out_of_pending():
    assert {row.who for row in TABLE if row.pending != "pending"} == {"admin"}


def test_nothing_that_an_agent_says_brings_an_unproven_node_online():
    by_agent = [row for row in TABLE if row.who == "agent" and row.cause != "beat"]
    assert all("online" not in row[2:] for row in by_agent)


def test_a_draining_node_leaves_that_state_only_by_falling_silent_failing_or_a_new_boot():
    ways = {row.cause for row in TABLE if row.draining != "draining"}
    assert ways == {
        "new_boot",
        "bad_address",
        "beat_late_30s",
        "connect_failed",
        "call_refused_thrice",
        "probe_failed",
    }
