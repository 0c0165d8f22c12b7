"""Gradient pruning, for adaptive federated optimisation.

The system of the project "Efficient Federated Learning using Gradient-Based Pruning and
Adaptive Federated Optimization" (HARSHALK2598/Federated-Learning-Research on GitHub),
made of published parts: threshold sparsification with what is left kept for later (Aji,
Heafield: Sparse Communication for Distributed Gradient Descent, EMNLP 2017), and
adaptive optimisers on the server (Reddi et al., ICLR 2021, in ``server_optimizer.py``).
Quantisation (``quantization.py``) composes with it, as with any other method.
``docs/gradient_pruning.md`` says what is read how.

A client sends the updates that are large beside their layer's largest, and keeps the
others, adding to them until they are.
"""

from dataclasses import dataclass

from gwpf_baseline.exchange.payload import Writer
from gwpf_baseline.learning.method_client import Task
from gwpf_baseline.learning.state import ClientState
from gwpf_baseline.methods import Method
from gwpf_baseline.methods.shared.pruning import above_threshold, largest_share, share
from gwpf_baseline.methods.shared.sparse import SparseClient, SparseStrategy
from gwpf_baseline.utils import ConfigError, is_number


@dataclass(frozen=True)
class GradientPruningConfig:
    """Hyper-parameters of gradient pruning.

    Parameters
    ----------
    threshold : float, default 0.01
        The least magnitude that is sent, as a share of the layer's largest, in
        ``[0, 1]``.
    keep : float or None, default None
        If set, takes the place of `threshold`: the share of each layer that is sent,
        the largest, in ``(0, 1]``.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    threshold: float = 0.01
    keep: float | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ConfigError("method.threshold", self.threshold, "in [0, 1]")
        keep = self.keep
        if keep is not None and (not is_number(keep) or not 0 < keep <= 1):
            raise ConfigError("method.keep", keep, "in (0, 1], or null")


class GradientPruningStrategy(SparseStrategy):
    """The server's half of gradient pruning.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncStrategy`; its `config` is a :class:`GradientPruningConfig`.
    """

    name = "gradient_pruning"
    config: GradientPruningConfig

    def most_sent(self) -> list[int]:
        """Return each layer's share, if one is set."""
        every = super().most_sent()
        if self.config.keep is None:
            return every
        return [share(self.config.keep, count) for count in every]


class GradientPruningClient(SparseClient):
    """The client's half of gradient pruning.

    Parameters
    ----------
    *args, **kwargs : object
        See :class:`SyncClient`; its `config` is a :class:`GradientPruningConfig`.
    """

    name = "gradient_pruning"
    config: GradientPruningConfig

    def upload(self, task: Task, state: ClientState, writer: Writer) -> float:
        """Train from the global model, and send what is large of all that is due."""
        residual = self.residual(state)
        delta, loss = self.train(task.weights, task, state)
        residual += delta.numpy()
        if self.config.keep is None:
            mask = above_threshold(residual, self.layers, self.config.threshold)
        else:
            mask = largest_share(residual, self.layers, self.config.keep)
        self.send(writer, state, residual, mask)
        return loss


METHOD = Method(GradientPruningConfig, GradientPruningStrategy, GradientPruningClient)
