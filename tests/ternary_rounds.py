"""What the tests of methods with ternary updates share: references, and trouble."""

import numpy as np
from federation import Federation, lose, payload_of
from flwr.common import Parameters

from gwpf_baseline.methods.shared.activity import Activity
from gwpf_baseline.methods.shared.ternary import read_ternary

LENGTH = 24


def walk(client: int, exchange: int) -> np.ndarray:
    """Return two steps that differ by client and exchange, float32 ``(2, 24)``."""
    rng = np.random.default_rng([client, exchange])
    return rng.standard_normal((2, LENGTH)).astype(np.float32)


def slow_ternary(vector: np.ndarray, keep: float) -> np.ndarray:
    """Compress as algorithm 1 is written, value by value."""
    count = max(1, int(np.ceil(keep * vector.size - 1e-9)))
    order = sorted(range(vector.size), key=lambda i: (-abs(vector[i]), i))
    kept = [i for i in order[:count] if vector[i] != 0]
    result = np.zeros(vector.size)
    if kept:
        magnitude = sum(abs(float(vector[i])) for i in kept) / len(kept)
        for i in kept:
            result[i] = magnitude if vector[i] > 0 else -magnitude
    return result


class Reference:
    """A federation of ternary updates and steps, in float64 and client by client.

    Parameters
    ----------
    clients : int
        How many there are.
    up, down : float
        The shares of an upload and of the server's step.
    step : float, default 1.0
        How many times what is taken the model moves.
    fading : float, default 1.0
        What is left of what a client holds when it trains again.
    """

    def __init__(
        self,
        clients: int,
        up: float,
        down: float,
        step: float = 1.0,
        fading: float = 1.0,
    ) -> None:
        self.model = np.ones(LENGTH)
        self.due = np.zeros(LENGTH)
        self.kept = np.zeros((clients, LENGTH))
        self.up, self.down, self.step, self.fading = up, down, step, fading

    def play(self, exchange: int, answers: dict[int, bool]) -> None:
        """Play a round in which some clients train, and the answers of some arrive."""
        total = np.zeros(LENGTH)
        for client, arrives in answers.items():
            learned = walk(client, exchange).sum(0, dtype=np.float64)
            self.kept[client] = self.fading * self.kept[client] + learned
            if arrives:
                sent = slow_ternary(self.kept[client], self.up)
                self.kept[client] -= sent
                total += sent / sum(answers.values())
        if any(answers.values()):
            self.due += total
            taken = slow_ternary(self.due, self.down)
            self.due -= taken
            self.model += self.step * taken


def given_by_clients(federation: Federation, rounds: int) -> np.ndarray:
    """Return what clients have learned by :func:`walk` and hold no more, their mean.

    After a last round by which they know that what they sent was used.
    """
    federation.play()
    parts = []
    for node in federation.nodes:
        walked = [walk(node.partition, e).sum(0) for e in range(1, rounds + 2)]
        learned = np.sum(walked, axis=0, dtype=np.float64)
        parts.append(learned - node.state.arrays["residual"])
    mean: np.ndarray = np.mean(parts, axis=0)
    return mean


# Who trains in each round, and whose answer arrives.
TROUBLE: list[dict[int, bool]] = [
    {0: True, 1: True, 2: True, 3: True},
    {0: True, 1: False, 2: True},
    {1: True, 3: False},
    {0: False, 2: False},
    {0: True, 1: True, 2: True, 3: True},
    {3: True},
    {3: True},
    {0: True, 1: True, 2: False, 3: True},
]


def play_in_trouble(federation: Federation, answers: dict[int, bool]) -> None:
    """Play a round with some nodes; the answers of some get lost."""
    manager = federation.server.client_manager()
    for node in federation.nodes:
        node.tamper = None if answers.get(node.partition, True) else lose
        (manager.register if node.partition in answers else manager.unregister)(node)
    federation.play()


def activity_before(message: Parameters, federation: Federation) -> Activity | None:
    """Return what is known of where the model has moved when a message is read.

    From the messages before it, which the first node has received, each with one step.
    """
    strategy = federation.strategy
    if strategy.activity is None:
        return None
    activity = Activity(strategy.layers)
    last = payload_of(message, federation).header.exchange
    for earlier in federation.nodes[0].received:
        reader = payload_of(earlier, federation)
        if 1 < reader.header.exchange < last:
            step = read_ternary(reader, strategy.dimension, activity)
            activity.note(step.positions)
    return activity
