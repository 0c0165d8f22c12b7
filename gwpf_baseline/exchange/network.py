"""What a round would take over a network: the model behind ``modelled_seconds``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gwpf_baseline.utils import ConfigError, is_number


class Leg(NamedTuple):
    """One client's part in an exchange.

    Parameters
    ----------
    downlink_bytes : int
        What the server sent to it.
    compute_seconds : float
        What it measured from message to answer.
    uplink_bytes : int
        What it answered.
    """

    downlink_bytes: int
    compute_seconds: float
    uplink_bytes: int


@dataclass(frozen=True)
class Network:
    """Links of fixed bandwidth between the clients and one server.

    Parameters
    ----------
    uplink_mbps, downlink_mbps : float
        Each client's bandwidth in 10**6 bits a second; the papers of APF and GWPF
        have 3 and 9.
    server_gbps : float, default 10.0
        The server's, in 10**9 bits a second in either direction, of which all clients
        of an exchange have equal shares.

    Raises
    ------
    ConfigError
        A bandwidth that is not a number above 0.
    """

    uplink_mbps: float
    downlink_mbps: float
    server_gbps: float = 10.0

    def __post_init__(self) -> None:
        """Check every value."""
        for key in ("uplink_mbps", "downlink_mbps", "server_gbps"):
            value = getattr(self, key)
            if not is_number(value) or not 0 < value < math.inf:
                raise ConfigError(f"network.{key}", value, "a number > 0")

    def seconds(self, legs: Sequence[Leg]) -> float:
        """Return how long an exchange takes: as long as its slowest client.

        Parameters
        ----------
        legs : sequence of Leg
            The clients that answered.

        Returns
        -------
        float
            Seconds; 0 if nobody answered.
        """
        share = self.server_gbps * 1e9 / max(1, len(legs))
        downlink = min(self.downlink_mbps * 1e6, share)
        uplink = min(self.uplink_mbps * 1e6, share)
        return max(
            (
                8 * leg.downlink_bytes / downlink
                + leg.compute_seconds
                + 8 * leg.uplink_bytes / uplink
                for leg in legs
            ),
            default=0.0,
        )
