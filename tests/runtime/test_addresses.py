from ipaddress import ip_address, ip_network

import pytest

from herd_node.runtime.addresses import network_of, own_addresses, own_networks


def test_the_machine_knows_its_own_loopback_and_every_address_lies_in_a_network_of_its_own():
    addresses = own_addresses()
    networks = own_networks()
    assert any(ip_address(address).is_loopback for address in addresses)
    assert len(set(addresses)) == len(addresses)
    assert all(any(ip_address(address) in network for network in networks) for address in addresses)
    assert not any("%" in address for address in addresses)


def test_two_readings_stand_in_the_same_order():
    assert own_networks() == own_networks()
    assert own_addresses() == own_addresses()


@pytest.mark.parametrize(
    ("address", "netmask", "network"),
    [
        ("192.168.1.20", "255.255.255.0", "192.168.1.0/24"),
        ("10.1.2.3", "255.0.0.0", "10.0.0.0/8"),
        ("100.64.0.7", "255.255.255.255", "100.64.0.7/32"),
        ("192.168.1.20", None, "192.168.1.20/32"),
        ("fd00::2", "ffff:ffff:ffff:ffff::", "fd00::/64"),
        ("fd00::2", None, "fd00::/64"),
        ("::1", None, "::1/128"),
        ("fe80::1", "ffff:ffff:ffff:ffff::/64", "fe80::/64"),
    ],
)
def test_the_network_around_an_address(address, netmask, network):
    assert network_of(address, netmask) == ip_network(network)


@pytest.mark.parametrize(
    ("address", "netmask"),
    [("10.8.0.2", "0.0.0.0"), ("10.8.0.2", "128.0.0.0"), ("10.8.0.2", "255.0.255.0"), ("fd00::2", "::")],
)
def test_a_tunnel_that_claims_the_whole_internet_makes_nobody_a_neighbour(address, netmask):
    assert network_of(address, netmask).num_addresses == 1
