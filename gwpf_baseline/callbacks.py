"""What happens around each round of every run; a user can add callbacks to these."""

from collections.abc import Callable
from pathlib import Path

import torch

from gwpf_baseline.learning.flat_model import layers
from gwpf_baseline.records.checkpoint import CheckpointFolder, checkpoint_name
from gwpf_baseline.records.history import RoundRecord
from gwpf_baseline.records.layers import LayerWatch, append_layers
from gwpf_baseline.records.target import metric_of, reaches
from gwpf_baseline.strategy import Callback, SyncStrategy

# (round, flat weights, flat buffers) -> (test loss, test accuracy), None to skip
EvaluateFn = Callable[[int, torch.Tensor, torch.Tensor], tuple[float, float] | None]


class Evaluation(Callback):
    """Measures the global model, and of a random network the mean one as well.

    Parameters
    ----------
    evaluate : callable
        From the round, the flat weights float32 ``(d,)`` and the flat buffers float32
        ``(b,)`` to test loss and accuracy; None in a round that is not measured.
    """

    def __init__(self, evaluate: EvaluateFn) -> None:
        self.evaluate = evaluate

    def measure(self, strategy: SyncStrategy, number: int) -> dict[str, float]:
        """Return test loss and accuracy."""
        weights, buffers = strategy.measured_weights(), strategy.buffers
        measured = self.evaluate(number, weights, buffers)
        if measured is None:
            return {}
        metrics = {"test_loss": measured[0], "test_accuracy": measured[1]}
        mean = strategy.mean_weights()
        if mean is not None:
            of_mean = self.evaluate(number, mean, buffers)
            if of_mean is not None:
                metrics["mean_accuracy"] = of_mean[1]
        return metrics


class OnRound(Callback):
    """Passes each round's record on.

    Parameters
    ----------
    see : callable
        Gets the record, for example to write or to show it.
    """

    def __init__(self, see: Callable[[RoundRecord], object]) -> None:
        self.see = see

    def after_round(self, strategy: SyncStrategy, record: RoundRecord) -> bool:
        """Pass the record on."""
        self.see(record)
        return False


class Checkpoints(Callback):
    """Writes the whole state of the run every few rounds.

    Parameters
    ----------
    folder : CheckpointFolder
        Where to.
    every : int
        Rounds between two checkpoints.
    """

    def __init__(self, folder: CheckpointFolder, every: int) -> None:
        self.folder = folder
        self.every = every

    def after_round(self, strategy: SyncStrategy, record: RoundRecord) -> bool:
        """Have all clients write their states, then write the server's."""
        if record.round % self.every == 0:
            name = checkpoint_name(record.round, strategy.weights.numpy())
            strategy.roster.ask_to_save(record.round, name, strategy.committed)
            self.folder.commit(name, strategy.state())
            strategy.committed = name
        return False


class StopAt(Callback):
    """Ends the run at the first evaluation that reaches a target.

    Parameters
    ----------
    target : float
        An accuracy of at least, or a perplexity of at most that much.
    metric : {"accuracy", "perplexity"}
        Which of the two it is.
    """

    def __init__(self, target: float, metric: str) -> None:
        self.target = target
        self.metric = metric

    def after_round(self, strategy: SyncStrategy, record: RoundRecord) -> bool:
        """Tell whether the target is reached."""
        return reaches(metric_of(record, self.metric), self.target, self.metric)


class Layers(Callback):
    """Writes every few rounds how each layer of the global model has developed.

    Parameters
    ----------
    strategy : SyncStrategy
        Holds the model before the first round, or the resumed one.
    folder : pathlib.Path
        The run's folder; what is written is of this run's rounds alone.
    every : int
        Rounds in a window.
    """

    def __init__(self, strategy: SyncStrategy, folder: Path, every: int) -> None:
        model = strategy.model
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        spans = {n: at.span for n, at in zip(names, layers(model), strict=True)}
        self.watch = LayerWatch(strategy.weights.numpy(), spans)
        self.folder = folder
        self.every = every
        self.written = False

    def after_round(self, strategy: SyncStrategy, record: RoundRecord) -> bool:
        """See the model, and write what became of it at the end of a window."""
        self.watch.see(strategy.weights.numpy())
        if record.round % self.every == 0:
            closed = self.watch.close(record.round)
            append_layers(self.folder, closed, new=not self.written)
            self.written = True
        return False
