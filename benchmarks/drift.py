"""How values that are no longer synchronised come apart on two clients.

APF's strawman partial_sync (Chen et al., ICDCS 2021, figure 4): LeNet-5 on CIFAR-10,
two clients of five classes each. What has become stable leaves synchronisation, is
trained on by each client for itself, and never comes back.
"""

import logging
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
from _common import add_data_option, announced, parser, show
from flwr.common import FitIns, FitRes
from matplotlib.figure import Figure

from gwpf_baseline.config import checked, compose_config
from gwpf_baseline.learning.flat_model import Layer
from gwpf_baseline.local import LocalFederation, LocalNode, federation
from gwpf_baseline.methods.apf import APFStrategy
from gwpf_baseline.records.plots import label_rounds

SHOWN = 2


class WatchedNode(LocalNode):
    """A node that keeps what its client's model is after each round's training."""

    models: list[np.ndarray]

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client answer, and look at the model that it has trained."""
        answer = super().fit(ins, timeout, group_id)
        # A process has one model, which is this client's until the next one's turn.
        vector = self.build(self.store).model.vector
        self.models.append(vector.detach().numpy().copy())
        return answer


def main() -> None:
    """Train, print how far the clients are apart, and draw two parameters."""
    logging.disable(logging.CRITICAL)
    arguments = parser(__doc__, rounds=120, seed=0)
    arguments.add_argument("--figure", type=Path, help="where to draw two parameters")
    add_data_option(arguments)
    options = arguments.parse_args()
    models, left, layers = play(options)
    apart = np.abs(models[0, -1] - models[1, -1])
    bounds = [options.rounds * part // 3 for part in range(4)]
    rows = [describe("in synchronisation", apart[left == options.rounds], apart.size)]
    for a, b in pairwise(bounds):
        out = apart[(a <= left) & (left < b)]
        rows.append(describe(f"out since round {a + 1} to {b}", out, apart.size))
    columns = ("values", "of all", "mean distance", "median distance")
    show("Between two clients, after the last round", columns, rows, options)
    if options.figure:
        draw(models, left, layers, options.seed).savefig(options.figure, dpi=150)


def play(options: Namespace) -> tuple[np.ndarray, np.ndarray, list[Layer]]:
    """Train two clients with partial_sync.

    Parameters
    ----------
    options : argparse.Namespace
        The parameters.

    Returns
    -------
    models : numpy.ndarray
        float32 ``(2, rounds, d)``, each client's after each round's training.
    left : numpy.ndarray
        int64 ``(d,)``, for how many rounds each coordinate was synchronised.
    layers : list of Layer
        The model's.
    """
    cfg = checked(
        compose_config(
            [
                "experiment=apf_lenet5-small",
                "method=partial_sync",
                "method.check_every=1",
                "method.threshold=0.1",
                "num_clients=2",
                "partition=disjoint",
                "partition.classes_per_client=5",
                f"dataset.path={options.data / 'cifar10'}",
                f"num_rounds={options.rounds}",
                f"seed={options.seed}",
            ]
        )
    )
    built = federation(cfg)
    strategy = built.strategy
    assert isinstance(strategy, APFStrategy)
    nodes = [WatchedNode(node.partition, node.build) for node in built.nodes]
    for node in nodes:
        node.models = []
    played = LocalFederation(strategy, nodes)
    # What has left does not come back.
    left = np.zeros(strategy.dimension, np.int64)
    for _ in announced(options.rounds * ["a round"]):
        played.play()
        left += strategy.mask
    return np.array([node.models for node in nodes]), left, strategy.layers


def describe(
    label: str, apart: np.ndarray, total: int
) -> tuple[str, str, float, float]:
    """Return a row: how far the clients are apart in some of all coordinates."""
    share = f"{apart.size / total:.1%}"
    if not apart.size:
        return label, share, float("nan"), float("nan")
    return label, share, float(apart.mean()), float(np.median(apart))


def draw(
    models: np.ndarray, left: np.ndarray, layers: list[Layer], seed: int
) -> Figure:
    """Draw two parameters that left synchronisation in the second quarter.

    Parameters
    ----------
    models, left, layers : object
        As of :func:`play`.
    seed : int
        By which the two are drawn by lot.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each of them, both clients in it.
    """
    rounds = models.shape[1]
    early = np.flatnonzero((left >= rounds // 4) & (left < rounds // 2))
    if early.size < SHOWN:
        raise SystemExit(f"fewer than {SHOWN} parameters leave by round {rounds // 2}")
    shown = np.sort(np.random.default_rng(seed).choice(early, SHOWN, False))
    figure = Figure((7, 2.8), layout="constrained")
    for axes, place in zip(figure.subplots(1, SHOWN), shown, strict=True):
        for client, values in enumerate(models[:, :, place]):
            axes.plot(range(1, rounds + 1), values, label=f"client {client + 1}")
        axes.axvline(
            left[place] + 0.5,
            color="0.6",
            linestyle=":",
            label="leaves synchronisation",
        )
        number = next(n for n, (span, _) in enumerate(layers) if place < span.stop)
        axes.set_title(f"a value of tensor {number + 1} of {len(layers)}", fontsize=10)
        label_rounds(axes)
    figure.supylabel("value after the client's training", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


if __name__ == "__main__":
    main()
