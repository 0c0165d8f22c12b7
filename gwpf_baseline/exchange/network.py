"""What a round would take over a network: the model behind ``modelled_seconds``."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gwpf_baseline.utils import ConfigError, derive_seed, is_number, is_whole

# 10**400 is a finite number too, but none that a float can be multiplied by.
_LARGEST = 2**63
# At which a third of the clients differ from the median by a factor of 22,000 or more.
_WIDEST = 10


class Leg(NamedTuple):
    """One client's part in an exchange.

    Parameters
    ----------
    client : int
        Its partition id.
    downlink_bytes : int
        What the server sent to it.
    compute_seconds : float
        What it measured from message to answer.
    uplink_bytes : int
        What it answered.
    """

    client: int
    downlink_bytes: int
    compute_seconds: float
    uplink_bytes: int


@dataclass(frozen=True)
class Network:
    """Links between the clients and one server, and how fast the clients compute.

    Parameters
    ----------
    uplink_mbps, downlink_mbps : float or sequence of float
        A client's bandwidth in 10**6 bits a second: everybody's, or one value for each
        client. The papers of APF and GWPF have 3 and 9.
    server_gbps : float, default 10.0
        The server's, in 10**9 bits a second in either direction, of which all clients
        of an exchange have equal shares.
    latency_ms : float, default 0
        What a message takes beside its bytes, one way, in milliseconds.
    overhead_bytes : int, default 0
        What the transport adds to a message of either direction: HTTP's headers,
        Flower's envelope.
    slowness : float or sequence of float, default 1
        How many times what it measured a client computes for: everybody, or one value
        for each client.
    spread : float, default 0
        How much clients differ beyond that: sigma of two log-normal factors of median
        1 that each client has for the whole run, one of its bandwidth in both
        directions, one of its computing time.
    seed : int, default 0
        The run's; the factors follow from it.

    Raises
    ------
    ConfigError
        A value out of its range.
    """

    uplink_mbps: float | Sequence[float]
    downlink_mbps: float | Sequence[float]
    server_gbps: float = 10.0
    latency_ms: float = 0
    overhead_bytes: int = 0
    slowness: float | Sequence[float] = 1
    spread: float = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        for key in ("uplink_mbps", "downlink_mbps", "slowness"):
            value = getattr(self, key)
            each = value if isinstance(value, list | tuple) else [value]
            if not all(map(_is_positive, each)):
                allowed = "a number > 0, or a list of one for each client"
                raise ConfigError(f"network.{key}", value, allowed)
        if not _is_positive(self.server_gbps):
            raise ConfigError("network.server_gbps", self.server_gbps, "a number > 0")
        if not is_number(self.latency_ms) or not 0 <= self.latency_ms < _LARGEST:
            raise ConfigError("network.latency_ms", self.latency_ms, "a number >= 0")
        size = self.overhead_bytes
        if not is_whole(size, 0) or not size < _LARGEST:
            raise ConfigError("network.overhead_bytes", size, "a whole number >= 0")
        if not is_number(self.spread) or not 0 <= self.spread <= _WIDEST:
            raise ConfigError("network.spread", self.spread, f"in [0, {_WIDEST}]")

    def seconds(self, legs: Sequence[Leg]) -> list[float]:
        """Return how long each client takes for an exchange.

        Parameters
        ----------
        legs : sequence of Leg
            The clients that answered.

        Returns
        -------
        list of float
            Seconds from the server's message to its having the answer; the exchange
            takes as long as its slowest client.
        """
        share = self.server_gbps * 1e9 / max(1, len(legs))
        return [
            self._travel(leg.downlink_bytes, self.downlink_mbps, leg.client, share)
            + leg.compute_seconds
            * _of(self.slowness, leg.client)
            * self._factor("compute", leg.client)
            + self._travel(leg.uplink_bytes, self.uplink_mbps, leg.client, share)
            for leg in legs
        ]

    def _travel(
        self, size: int, mbps: float | Sequence[float], client: int, share: float
    ) -> float:
        """Return the seconds of a message; `share` is the server's bits a second."""
        own = _of(mbps, client) * 1e6 * self._factor("bandwidth", client)
        bits = 8 * (size + self.overhead_bytes)
        return self.latency_ms / 1e3 + bits / min(own, share)

    def _factor(self, use: str, client: int) -> float:
        return _draw_factor(self.spread, self.seed, use, client)


@functools.cache
def _draw_factor(spread: float, seed: int, use: str, client: int) -> float:
    rng = np.random.default_rng(derive_seed(seed, "network", use, client))
    return float(rng.lognormal(sigma=spread))


def _of(value: float | Sequence[float], client: int) -> float:
    return value[client] if isinstance(value, Sequence) else value


def _is_positive(value: Any) -> bool:
    return is_number(value) and 0 < value < _LARGEST
