"""Where a node may be called."""

import pytest

from herd.fleet.address import refused

OWN = ("192.168.1.20", "fd00::20", "127.0.0.1", "fe80::1")


@pytest.mark.parametrize(
    "peer", ["192.168.1.20", "::ffff:192.168.1.20", "fd00::20", "FD00:0::20", "127.0.0.1", "::1"]
)
def test_a_peer_that_is_an_address_of_its_own_or_this_machine_may_be_called(peer):
    assert refused(peer, 11436, OWN) is None


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_the_same_machine_need_not_list_its_loopback(peer):
    assert refused(peer, 11436, ()) is None


@pytest.mark.parametrize(
    "peer",
    [
        "192.168.1.21",
        "fd00::21",
        "fe80::1",
        "fe80::1%eth0",
        "169.254.3.4",
        "224.0.0.1",
        "0.0.0.0",
        "::",
        "attic",
    ],
)
def test_any_other_peer_is_refused_with_a_reason(peer):
    reason = refused(peer, 11436, OWN)
    assert reason is not None
    assert "heartbeat came from" in reason


def test_a_loopback_address_in_the_list_does_not_open_a_relay():
    assert refused("192.168.1.99", 11436, ("127.0.0.1", "::1")) is not None


@pytest.mark.parametrize("port", [0, 80, 1023, 65536, -1])
def test_a_port_out_of_range_is_refused(port):
    assert "port" in (refused("127.0.0.1", port, OWN) or "")


@pytest.mark.parametrize("port", [1024, 65535])
def test_the_first_and_the_last_port_are_allowed(port):
    assert refused("127.0.0.1", port, OWN) is None


def test_garbage_among_its_own_addresses_is_overlooked():
    assert refused("192.168.1.20", 11436, ("", "no address", "192.168.1.20")) is None
