"""What one of ten clients can do to the model by sending what it has not learned.

The final accuracy on digits, LeNet-5, after some rounds: without an attack, and with
one in every round. The bound on norms (norm_bound) is the default.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from _common import announced, parser, show
from flwr.common import FitIns, FitRes

import gwpf_baseline.learning.client
from gwpf_baseline.config import checked, compose_config, config_dir, workbench
from gwpf_baseline.exchange.payload import Part, Writer
from gwpf_baseline.local import LocalFederation, LocalNode, federation
from gwpf_baseline.server_app import Evaluator

# What is put in the place of each float of an upload: a number, or a multiple of it.
ATTACKS: dict[str, dict[str, float]] = {
    "1e20": {"value": 1e20},
    "3.4e38": {"value": 3.4e38},
    "times -1000": {"factor": -1000.0},
}
# Methods that hardly learn anything in so few rounds of the default run.
TUNED = {
    "cmfl": ["method=cmfl", "method.threshold=0.5"],
    "fedpm": ["method=fedpm", "optimizer=adam", "lr=0.3"],
    "fedpm_paper": ["method=fedpm_paper", "optimizer=adam", "lr=0.3"],
    "zerofl": ["method=zerofl", "method.upload=diff_on_top_k", "lr=0.2"],
}
# With an adaptive optimiser of the server, and rounded.
MORE = {
    "fedavg, fedadam": [
        "method=fedavg",
        "server_optimizer=fedadam",
        "server_optimizer.lr=0.01",
    ],
    "gwpf_paper, 8 bits": ["method=gwpf_paper", "quantization.bits=8"],
}


class AttackWriter(Writer):
    """Writes something else than an upload's values."""

    value: float | None = None
    factor: float | None = None

    def bitmap(
        self,
        bits: np.ndarray,
        expected: np.ndarray | None = None,
        part: Part = Part.POSITIONS,
    ) -> None:
        """Turn all signs, where values are signs, and all of a mask that is sent."""
        turned = part is Part.VALUES and self.factor is not None
        super().bitmap(~bits if turned else bits, expected, part)

    def vector(self, values: np.ndarray, part: Part = Part.VALUES) -> None:
        """Put other floats in the place of values; rounded ones follow their steps."""
        if part is Part.VALUES and values.dtype == np.float32:
            if self.factor is None:
                values = np.full_like(values, self.value)
            else:
                # A single one is a magnitude, whose signs are turned already.
                sign = -1 if values.size == 1 else 1
                values = values * np.float32(sign * self.factor)
        super().vector(values, part)


@contextmanager
def attacking(attack: dict[str, float]) -> Iterator[None]:
    """Let clients that answer meanwhile attack."""
    writer = type("Armed", (AttackWriter,), dict(attack))
    with patch.object(gwpf_baseline.learning.client, "Writer", writer):
        yield


class Attacker(LocalNode):
    """A node that sends something else than its client has learned."""

    attack: dict[str, float]

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client answer, but not what it would."""
        with attacking(self.attack):
            return super().fit(ins, timeout, group_id)


def accuracy(
    overrides: list[str], rounds: int, attack: dict[str, float] | None
) -> float:
    """Run a federation and return its model's final test accuracy."""
    cfg = checked(compose_config([*overrides, f"num_rounds={rounds}"]))
    bench = workbench(cfg)
    played = federation(cfg, bench)
    if attack is not None:
        node = Attacker(0, played.nodes[0].build)
        node.attack = attack
        played = LocalFederation(played.strategy, [node, *played.nodes[1:]])
    played.play(rounds)
    strategy = played.strategy
    weights = strategy.measured_weights()
    measured = Evaluator(cfg, bench)(rounds, weights, strategy.buffers)
    assert measured is not None
    return measured[1]


def main() -> None:
    """Attack every method and print the table."""
    # Every failure is meant.
    logging.disable(logging.CRITICAL)
    options = parser(__doc__, rounds=20, seed=0)
    options.add_argument("--methods", nargs="*", help="(all)")
    chosen = options.parse_args()
    files = sorted(config_dir().glob("method/*.yaml"))
    runs = {file.stem: [f"method={file.stem}"] for file in files} | TUNED | MORE
    rows = []
    for name in announced(chosen.methods or runs):
        overrides = [*runs[name], f"seed={chosen.seed}"]
        attacks = [None, *ATTACKS.values()]
        reached = [accuracy(overrides, chosen.rounds, each) for each in attacks]
        worst = min(reached[1:]) - reached[0]
        rows.append((name, *(f"{each:.4f}" for each in reached), f"{worst:+.4f}"))
    columns = ("method", "no attack", *ATTACKS, "worst, goal >= -0.02")
    show("One of ten clients attacks", columns, rows, chosen)


if __name__ == "__main__":
    main()
