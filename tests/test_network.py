"""Tests of the network model, against times worked out by hand."""

import math
from typing import Any

import pytest

from gwpf_baseline.exchange.network import Leg, Network
from gwpf_baseline.utils import ConfigError

MEGABYTE = 10**6


def test_an_exchange_takes_as_long_as_its_slowest_client() -> None:
    """9 MB down at 9 Mbps is 8 s, 3 MB up at 3 Mbps is 8 s."""
    network = Network(uplink_mbps=3, downlink_mbps=9)
    slow = Leg(9 * MEGABYTE, 0.5, 3 * MEGABYTE)
    fast = Leg(9 * MEGABYTE, 2.0, 0)
    assert network.seconds([fast]) == pytest.approx(10)
    assert network.seconds([fast, slow]) == pytest.approx(16.5)
    assert network.seconds([]) == 0


def test_clients_share_the_server() -> None:
    """10 Gbps among 5000 clients leaves 2 Mbps to each."""
    network = Network(uplink_mbps=3, downlink_mbps=9)
    legs = [Leg(MEGABYTE, 0.0, MEGABYTE)] * 5000
    assert network.seconds(legs) == pytest.approx(4 + 4)


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, None, True, "9"])
@pytest.mark.parametrize("key", ["uplink_mbps", "downlink_mbps", "server_gbps"])
def test_a_bandwidth_is_a_number(key: str, value: Any) -> None:
    """Anything else is named."""
    with pytest.raises(ConfigError, match=f"network.{key}={value}: must be"):
        Network(**{"uplink_mbps": 3, "downlink_mbps": 9, key: value})
