"""Tests of the network model, against times worked out by hand."""

import math
import statistics
from typing import Any

import pytest

from gwpf_baseline.config import checked, compose_config, network_config
from gwpf_baseline.exchange.network import Leg, Network
from gwpf_baseline.utils import ConfigError

MEGABYTE = 10**6
LINKS = ("network.uplink_mbps=3", "network.downlink_mbps=9")


def configured(*overrides: str) -> Network | None:
    """Return the network of a checked command line for three clients."""
    return network_config(checked(compose_config(["num_clients=3", *overrides])))


def test_every_client_takes_its_own_time() -> None:
    """9 MB down at 9 Mbps is 8 s, 3 MB up at 3 Mbps is 8 s."""
    network = Network(uplink_mbps=3, downlink_mbps=9)
    slow = Leg(0, 9 * MEGABYTE, 0.5, 3 * MEGABYTE)
    fast = Leg(1, 9 * MEGABYTE, 2.0, 0)
    assert network.seconds([fast]) == pytest.approx([10])
    assert network.seconds([fast, slow]) == pytest.approx([10, 16.5])
    assert network.seconds([]) == []


def test_clients_share_the_server() -> None:
    """10 Gbps among 5000 clients leaves 2 Mbps to each."""
    network = Network(uplink_mbps=3, downlink_mbps=9)
    legs = [Leg(client, MEGABYTE, 0.0, MEGABYTE) for client in range(5000)]
    assert network.seconds(legs) == pytest.approx([4 + 4] * 5000)


def test_by_default_a_leg_is_bytes_and_computing_to_the_bit() -> None:
    """What else a network can have adds and multiplies nothing."""
    network = configured(*LINKS)
    assert network == Network(3, 9)
    for client in range(100):
        down, compute, up = 12_345 + client, 0.1 + client / 7, 999 * client
        expected = 8 * down / 9e6 + compute + 8 * up / 3e6
        assert network.seconds([Leg(client, down, compute, up)]) == [expected]


def test_a_small_message_takes_its_latency_and_its_envelope() -> None:
    """Twice 50 ms, and 250 bytes beside the message's own, each way."""
    network = configured(*LINKS, "network.latency_ms=50", "network.overhead_bytes=250")
    assert network is not None
    down, up = 8 * (125 + 250) / 9e6, 8 * (500 + 250) / 3e6
    seconds = network.seconds([Leg(0, 125, 0.2, 500)])
    assert seconds == pytest.approx([0.05 + down + 0.2 + 0.05 + up])
    # A client that is sent nothing is sent a message all the same.
    both = 8 * 250 / 9e6 + 8 * 250 / 3e6
    assert network.seconds([Leg(0, 0, 0.0, 0)]) == pytest.approx([0.1 + both])


def test_a_list_has_a_value_for_each_client() -> None:
    """By its number, whoever else takes part, and within the server's share."""
    network = configured(
        "network.uplink_mbps=[3,1,8]",
        "network.downlink_mbps=[9,1,16]",
        "network.slowness=[1,2.5,0.5]",
        "network.server_gbps=0.008",
    )
    assert network is not None
    legs = [Leg(client, MEGABYTE, 2.0, MEGABYTE) for client in (2, 1)]
    # The server has 4 Mbps for each of two.
    assert network.seconds(legs) == pytest.approx([2 + 1 + 2, 8 + 5 + 8])
    assert network.seconds(legs[:1]) == pytest.approx([1 + 1 + 1])
    one_for_all = configured("network.slowness=3", *LINKS)
    assert one_for_all is not None
    assert one_for_all.seconds([Leg(2, 0, 2.0, 0)]) == [6.0]


def test_a_spread_is_a_factor_of_each_client_for_the_whole_run() -> None:
    """Log-normal of median 1 and that sigma; another for computing than for bandwidth;
    the same in every process, and in both directions."""
    network = Network(3, 9, server_gbps=1e9, spread=0.5, seed=7)
    clients = range(2000)
    down, up, compute = (
        [network.seconds([Leg(client, *parts)])[0] for client in clients]
        for parts in ((9 * MEGABYTE, 0.0, 0), (0, 0.0, 3 * MEGABYTE), (0, 8.0, 0))
    )
    assert down == pytest.approx(up)
    logs = [[math.log(seconds / 8) for seconds in those] for those in (down, compute)]
    for values in logs:
        assert statistics.mean(values) == pytest.approx(0, abs=0.05)
        assert statistics.stdev(values) == pytest.approx(0.5, abs=0.03)
    assert abs(statistics.correlation(*logs)) < 0.1
    again = Network(3, 9, server_gbps=1e9, spread=0.5, seed=7)
    legs = [Leg(client, 0, 8.0, 0) for client in reversed(clients)]
    assert again.seconds(legs) == compute[::-1]
    other = Network(3, 9, server_gbps=1e9, spread=0.5, seed=8)
    assert other.seconds(legs) != compute[::-1]


def test_a_spread_comes_upon_a_list() -> None:
    """Its factors are those that equal clients would have."""
    legs = [Leg(client, MEGABYTE, 0.0, MEGABYTE) for client in range(3)]
    equal = configured(*LINKS, "network.spread=1")
    lists = configured(
        "network.uplink_mbps=[3,6,3]",
        "network.downlink_mbps=[9,18,9]",
        "network.spread=1",
    )
    assert equal is not None and lists is not None
    first, second, third = equal.seconds(legs)
    assert lists.seconds(legs) == pytest.approx([first, second / 2, third])
    assert len({first, second, third}) == 3
    reseeded = configured(*LINKS, "network.spread=1", "seed=1")
    assert reseeded is not None and reseeded.seconds(legs) != equal.seconds(legs)


NO_NUMBERS = [-1, math.inf, math.nan, None, True, "9", 10**400, [[1.0]]]


@pytest.mark.parametrize("value", [0, *NO_NUMBERS, [3, 0, 3], [3, math.nan], [True]])
@pytest.mark.parametrize("key", ["uplink_mbps", "downlink_mbps", "slowness"])
def test_a_client_has_numbers_above_0(key: str, value: Any) -> None:
    """Anything else is named, also within a list."""
    with pytest.raises(
        ConfigError, match=f"^network.{key}=.*: must be a number > 0, or"
    ):
        Network(**{"uplink_mbps": 3, "downlink_mbps": 9, key: value})


@pytest.mark.parametrize(
    ("key", "more", "allowed"),
    [
        ("server_gbps", [0, [1, 1]], "a number > 0"),
        ("latency_ms", [[1, 1]], "a number >= 0"),
        ("overhead_bytes", [1.5, [1, 1]], "a whole number >= 0"),
        ("spread", [10.1, [1, 1]], "in [0, 10]"),
    ],
)
def test_all_clients_have_one_number_in_its_range(
    key: str, more: list[Any], allowed: str
) -> None:
    """Anything else is named."""
    for value in (*NO_NUMBERS, *more):
        with pytest.raises(ConfigError) as caught:
            Network(**{"uplink_mbps": 3, "downlink_mbps": 9, key: value})
        start, _, end = str(caught.value).partition(": must be ")
        assert start.startswith(f"network.{key}=")
        assert end == allowed


@pytest.mark.parametrize("key", ["uplink_mbps", "downlink_mbps", "slowness"])
@pytest.mark.parametrize("values", ["[]", "[1]", "[1,2]", "[1,2,3,4]"])
def test_a_list_of_another_length_is_refused_before_the_run(
    key: str, values: str
) -> None:
    """In one line, which says how many there have to be."""
    line = f"^network.{key}=.*: must be a number, or a list of 3, one for each client$"
    with pytest.raises(ConfigError, match=line):
        configured(*LINKS, f"network.{key}={values}")


def test_without_a_bandwidth_the_rest_is_checked_all_the_same() -> None:
    """It may be meant for later, but has to be right."""
    assert configured("network.spread=1", "network.slowness=[1,2,3]") is None
    for key, value in (("spread", "-1"), ("latency_ms", "x"), ("slowness", "[1,2]")):
        with pytest.raises(ConfigError, match=f"^network.{key}="):
            configured(f"network.{key}={value}")
