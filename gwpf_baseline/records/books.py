"""The books: what each round cost, from its messages to its record."""

import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gwpf_baseline.exchange.network import Leg, Network
from gwpf_baseline.exchange.payload import Part, Sizes
from gwpf_baseline.records.history import LARGEST, RoundRecord


@dataclass
class Direction:
    """What travelled one way in a round.

    Parameters
    ----------
    total : int
        Bytes.
    sizes : Counter of Part
        What they were spent on; the rest is overhead.
    """

    total: int = 0
    sizes: Sizes = field(default_factory=Counter)

    def add(self, size: int, sizes: Sizes) -> None:
        """Count a message."""
        self.total += size
        self.sizes += sizes

    def columns(self, way: str) -> dict[str, int]:
        """Return the columns of a record, ``uplink_bytes`` and its parts."""
        parts = {f"{way}_{part}_bytes": self.sizes[part] for part in Part}
        overhead = self.total - self.sizes.total()
        return {
            f"{way}_bytes": self.total,
            **parts,
            f"{way}_overhead_bytes": overhead,
        }


@dataclass
class Tally:
    """The round under way.

    Parameters
    ----------
    asked : int
        Clients that were asked.
    used : int
        Clients whose upload was used.
    failures : int
        Answers that got lost or were refused.
    up, down : Direction
        What travelled.
    losses : list of float
        Training losses.
    compute_seconds : dict of int to float
        What each client computed for.
    modelled_seconds : float
        How long the round would have taken over the configured network.
    client_seconds : dict of int to float
        How long each client that answered would have taken over it.
    """

    asked: int = 0
    used: int = 0
    failures: int = 0
    up: Direction = field(default_factory=Direction)
    down: Direction = field(default_factory=Direction)
    losses: list[float] = field(default_factory=list)
    compute_seconds: dict[int, float] = field(default_factory=dict)
    modelled_seconds: float = 0.0
    client_seconds: dict[int, float] = field(default_factory=dict)


class Books:
    """The records of all rounds, and the tally of the one under way.

    Parameters
    ----------
    dense_bytes : int
        Bytes of the values of one dense model, which FedAvg sends both ways.
    dimension : int
        d.
    network : Network or None
        The network whose time is modelled.

    Attributes
    ----------
    records : list of RoundRecord
        The rounds that have ended.
    first_round : int
        Number of this process's first round; above 1 after a resume.
    tally : Tally
        The round under way.
    """

    def __init__(
        self, dense_bytes: int, dimension: int, network: Network | None
    ) -> None:
        self.dense_bytes = dense_bytes
        self.dimension = dimension
        self.network = network
        self.records: list[RoundRecord] = []
        self.first_round = 1
        self.tally = Tally()
        self._started = time.monotonic()
        # Of the exchange under way:
        self._message_bytes: dict[int, int] = {}
        self._sent_at = 0.0
        self._legs: list[Leg] = []

    def restore(self, records: list[RoundRecord]) -> None:
        """Go on after a resumed run's records."""
        self.records = records
        if records:
            self.first_round = records[-1].round + 1
            self._started = time.monotonic() - records[-1].seconds

    def absolute(self, server_round: int) -> int:
        """Return a round's number; Flower counts a resumed run's from 1 again."""
        return self.first_round + server_round - 1

    def open_round(self, asked: int) -> None:
        """Begin a round for which so many clients are asked."""
        self.tally = Tally(asked)

    def sent(self, client: int, size: int, sizes: Sizes) -> None:
        """Count a message to a client."""
        self.tally.down.add(size, sizes)
        self._message_bytes[client] = size

    def all_sent(self, seconds: float) -> None:
        """Note that the exchange's messages, which took so long, are on their way."""
        self.tally.modelled_seconds += seconds
        self._sent_at = time.monotonic()

    @property
    def waiting_for(self) -> set[int]:
        """The clients that were sent a message of the exchange."""
        return set(self._message_bytes)

    def received(self, size: int, sizes: Sizes) -> None:
        """Count an answer."""
        self.tally.up.add(size, sizes)

    def worked(self, client: int, size: int, seconds: object, waited: float) -> None:
        """Note how long a client took for a sound answer.

        Parameters
        ----------
        client : int
            Its partition id.
        size : int
            Its answer's bytes.
        seconds : object
            What it says that it has computed for; 0 is taken for what is no time.
        waited : float
            How long the server has waited: nobody computed for longer.
        """
        compute = 0.0
        if isinstance(seconds, float) and 0 <= seconds < np.inf:
            compute = min(seconds, waited)
            total = self.tally.compute_seconds
            total[client] = total.get(client, 0.0) + compute
        self._legs.append(Leg(client, self._message_bytes[client], compute, size))

    def waited(self) -> float:
        """Return the seconds since the exchange's messages were sent."""
        return time.monotonic() - self._sent_at

    def learned(self, loss: object) -> None:
        """Note a client's training loss, if it is one."""
        # A NaN is not below.
        if isinstance(loss, float) and 0 <= loss < LARGEST:
            self.tally.losses.append(loss)

    def close_exchange(self, seconds: float) -> None:
        """Add up the exchange's time; the server's own part of it took `seconds`."""
        if self.network is not None:
            taken = self.network.seconds(self._legs)
            self.tally.modelled_seconds += max(taken, default=0.0)
            total = self.tally.client_seconds
            for leg, own in zip(self._legs, taken, strict=True):
                total[leg.client] = total.get(leg.client, 0.0) + own
        self.tally.modelled_seconds += seconds
        self._message_bytes, self._legs = {}, []

    def close_round(self, number: int, metrics: dict[str, float]) -> RoundRecord:
        """Make a round's record.

        Parameters
        ----------
        number : int
            The round.
        metrics : dict of str to float
            What was measured, by the record's column.

        Returns
        -------
        RoundRecord
            The record, which is also the last of `records`.
        """
        this = self.tally
        last = self.records[-1] if self.records else None
        values = this.asked * self.dimension
        dense = 2 * this.asked * self.dense_bytes
        compute = list(this.compute_seconds.values())
        taken = list(this.client_seconds.values())
        before = (last.modelled_seconds if last else None) or 0.0
        columns: dict[str, Any] = {
            "test_accuracy": None,
            "test_loss": None,
            "frozen_fraction": None,
            "sent_fraction": None,
            **metrics,
        }
        record = RoundRecord(
            round=number,
            seconds=time.monotonic() - self._started,
            train_loss=float(np.mean(this.losses)) if this.losses else None,
            **this.up.columns("uplink"),
            **this.down.columns("downlink"),
            cumulative_uplink_bytes=this.up.total
            + (last.cumulative_uplink_bytes if last else 0),
            cumulative_downlink_bytes=this.down.total
            + (last.cumulative_downlink_bytes if last else 0),
            dense_bytes=dense + (last.dense_bytes if last else 0),
            clients=this.used,
            failures=this.failures,
            compute_seconds=float(np.mean(compute)) if compute else None,
            modelled_seconds=before + this.modelled_seconds if self.network else None,
            uplink_bits_per_parameter=8 * this.up.total / values if values else None,
            downlink_bits_per_parameter=(
                8 * this.down.total / values if values else None
            ),
            slowest_client_seconds=max(taken, default=None),
            median_client_seconds=statistics.median(taken) if taken else None,
            **columns,
        )
        self.records.append(record)
        return record
