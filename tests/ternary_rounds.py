"""What the tests of methods with ternary updates share: references, and trouble."""

import numpy as np
from federation import Federation, lose

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
