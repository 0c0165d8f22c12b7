"""The local loop: a data cursor that goes on across rounds, a flat optimiser."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from gwpf_baseline.data.task import TaskData, prepare
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.utils import ConfigError, derive_seed, is_number, is_whole

OPTIMIZERS = ("sgd", "adam")
PRECISIONS = ("fp32", "tf32", "bf16")
_MAX_LOGITS = 1 << 24  # of one chunk of an evaluation, 64 MiB

StepHook = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class TrainingConfig:
    """How a client trains in one round.

    Parameters
    ----------
    local_steps : int, default 5
        tau, the iterations of a round.
    local_epochs : float, optional
        If set, takes the place of `local_steps`: passes over the client's data,
        rounded up to whole batches.
    batch_size : int, default 50
        Samples an iteration.
    optimizer : {"sgd", "adam"}, default "sgd"
        The local optimiser.
    lr : float, default 0.05
        Learning rate.
    lr_milestones : sequence of int, default none
        Rounds after each of which the learning rate is multiplied by `lr_decay`.
    lr_decay : float, default 0.1
        In ``(0, 1]``.
    momentum : float, default 0.0
        Momentum of ``sgd``, in ``[0, 1)``.
    weight_decay : float, default 0.0
        L2 penalty.
    grad_clip : float, optional
        If set, the largest L2 norm of an iteration's gradient; longer ones are scaled.
    persist_optimizer : bool, default False
        Whether the optimiser's moments go on from round to round.
    precision : {"fp32", "tf32", "bf16"}, default "fp32"
        ``bf16`` by autocast; ``tf32`` in products and convolutions, on a GPU, elsewhere
        as ``fp32``.

    Raises
    ------
    ConfigError
        A value that is not allowed.
    """

    local_steps: int = 5
    local_epochs: float | None = None
    batch_size: int = 50
    optimizer: str = "sgd"
    lr: float = 0.05
    lr_milestones: Sequence[int] = ()
    lr_decay: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    grad_clip: float | None = None
    persist_optimizer: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Check every value."""
        for key in ("local_steps", "batch_size"):
            if not is_whole(getattr(self, key), 1):
                raise ConfigError(key, getattr(self, key), "a whole number >= 1")
        for key in ("local_epochs", "lr", "grad_clip"):
            value = getattr(self, key)
            optional = key != "lr" and value is None
            if not optional and not _between(value, sys.float_info.min, math.inf):
                raise ConfigError(key, value, "a number > 0")
        if not isinstance(self.lr_milestones, Sequence) or not all(
            is_whole(milestone, 1) for milestone in self.lr_milestones
        ):
            raise ConfigError(
                "lr_milestones", self.lr_milestones, "a list of rounds, as in [20,30]"
            )
        if not is_number(self.lr_decay) or not 0 < self.lr_decay <= 1:
            raise ConfigError("lr_decay", self.lr_decay, "in (0, 1]")
        if not _between(self.momentum, 0, 1):
            raise ConfigError("momentum", self.momentum, "in [0, 1)")
        if not _between(self.weight_decay, 0, math.inf):
            raise ConfigError("weight_decay", self.weight_decay, "a number >= 0")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(
                "precision", self.precision, f"one of {', '.join(PRECISIONS)}"
            )

    def steps(self, num_examples: int) -> int:
        """Return the iterations of a round for a client with so many examples."""
        if self.local_epochs is None:
            return self.local_steps
        # 0.28 of 25 are 7, though as floats it is more.
        exactly = self.local_epochs * num_examples / self.batch_size
        return math.ceil(exactly * (1 - 1e-12))

    def lr_in(self, server_round: int) -> float:
        """Return the learning rate of a round."""
        passed = sum(milestone < server_round for milestone in self.lr_milestones)
        return self.lr * self.lr_decay**passed


def _between(value: object, low: float, high: float) -> bool:
    return is_number(value) and low <= value < high


class Batches:
    """One client's endless stream of batches.

    The stream is the concatenation of one permutation of the client's data an epoch,
    each drawn from the seed, the client and the epoch. A position in it is thus all
    the state there is, and every batch is full, also where an epoch ends within it.

    Parameters
    ----------
    data : TaskData
        The data of all clients.
    indices : numpy.ndarray
        int64 ``(n,)``, the rows of the training data that are this client's.
    seed : int
        The run's seed.
    client : int
        The client's partition id.
    augment : bool, default False
        Whether to augment.
    """

    def __init__(
        self,
        data: TaskData,
        indices: np.ndarray,
        seed: int,
        client: int,
        augment: bool = False,
    ) -> None:
        self.data = data
        self.indices = indices
        self.seed = seed
        self.client = client
        self.augment = augment
        self._epoch = -1
        self._order = indices

    def __len__(self) -> int:
        """Return the number of the client's examples."""
        return len(self.indices)

    def rows(self, cursor: int, count: int) -> np.ndarray:
        """Return the data rows at a position of the stream.

        Parameters
        ----------
        cursor : int
            Samples drawn so far.
        count : int
            Samples to draw.

        Returns
        -------
        numpy.ndarray
            int64 ``(count,)``.
        """
        rows = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, start = divmod(cursor + filled, len(self))
            if epoch != self._epoch:
                seed = derive_seed(self.seed, "order", self.client, epoch)
                self._order = np.random.default_rng(seed).permutation(self.indices)
                self._epoch = epoch
            part = self._order[start : start + count - filled]
            rows[filled : filled + len(part)] = part
            filled += len(part)
        return rows

    def draw(
        self,
        cursor: int,
        batch_size: int,
        steps: int,
        device: torch.device,
        generator: torch.Generator,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches of a round, normalised and augmented one by one.

        Parameters
        ----------
        cursor : int
            Samples drawn so far.
        batch_size : int
            Samples of a batch.
        steps : int
            Batches.
        device : torch.device
            Where to; all that the round needs goes there at once.
        generator : torch.Generator
            For the augmentation.

        Yields
        ------
        inputs, targets : torch.Tensor
            Of one batch.
        """
        rows = self.rows(cursor, steps * batch_size)
        inputs = torch.from_numpy(self.data.train_inputs[rows]).to(device)
        targets = torch.from_numpy(self.data.train_targets[rows]).to(device)
        for x, y in zip(
            inputs.split(batch_size), targets.split(batch_size), strict=True
        ):
            yield prepare(x, self.data, self.augment, generator), y


def train(
    model: FlatModel,
    batches: Batches,
    config: TrainingConfig,
    cursor: int,
    moments: dict[str, np.ndarray] | None = None,
    *,
    server_round: int = 1,
    on_step: StepHook | None = None,
) -> tuple[float, dict[str, np.ndarray]]:
    """Run one round's local iterations in place.

    Parameters
    ----------
    model : FlatModel
        The model, holding the weights to start from.
    batches : Batches
        The client's data.
    config : TrainingConfig
        What to run.
    cursor : int
        Position in the client's stream of samples.
    moments : dict of str to numpy.ndarray, optional
        The optimiser's state of the last round; default: a new optimiser.
    server_round : int, default 1
        The round, which the learning rate follows.
    on_step : callable, optional
        Called with the parameter vector after every iteration.

    Returns
    -------
    loss : float
        Mean training loss over the iterations.
    moments : dict of str to numpy.ndarray
        The optimiser's state, empty unless `config.persist_optimizer`.
    """
    # Whatever the model draws (dropout) and the augmentation draw follow from the
    # place in the stream, not from the process that happens to run this client.
    _seed_draws(
        derive_seed(batches.seed, "model", batches.client, cursor), model.device
    )
    generator = torch.Generator()
    generator.manual_seed(derive_seed(batches.seed, "augment", batches.client, cursor))
    _set_precision(config.precision)
    kept = moments if config.persist_optimizer else None
    optimizer = _Optimizer(model.vector, config, config.lr_in(server_round), kept)
    total = torch.zeros((), device=model.device)
    steps = config.steps(len(batches))
    model.module.train()
    for x, y in batches.draw(cursor, config.batch_size, steps, model.device, generator):
        model.zero_grad()
        with _autocast(config.precision, model.device):
            loss = functional.cross_entropy(*_flat(model.module(x), y))
        loss.backward()
        if config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.vector, config.grad_clip)
        optimizer.step()
        total += loss.detach()
        if on_step is not None:
            on_step(model.vector.detach())
    saved = optimizer.moments() if config.persist_optimizer else {}
    return float(total) / steps, saved


@torch.no_grad()
def evaluate(
    model: FlatModel, data: TaskData, batch_size: int = 1000
) -> tuple[float, float]:
    """Measure a model on the test set.

    Parameters
    ----------
    model : FlatModel
        The model.
    data : TaskData
        The data; its test inputs are normalised, never augmented.
    batch_size : int, default 1000
        Examples at a time; fewer where each has very many logits, as text has.

    Returns
    -------
    loss : float
        Mean cross-entropy of a target; its exponential is the perplexity.
    accuracy : float
        Share of correct answers.
    """
    # Whoever evaluates may never have trained, or in another precision.
    _set_precision("fp32")
    model.module.eval()
    loss, correct = 0.0, 0
    rows, *targets = data.test_targets.shape
    logits_each = math.prod(targets) * data.num_classes
    batch_size = max(1, min(batch_size, _MAX_LOGITS // logits_each))
    for start in range(0, rows, batch_size):
        stop = min(start + batch_size, rows)
        x = torch.from_numpy(np.array(data.test_inputs[start:stop])).to(model.device)
        y = torch.from_numpy(np.array(data.test_targets[start:stop])).to(model.device)
        logits, y = _flat(model.module(prepare(x, data)), y)
        loss += float(functional.cross_entropy(logits, y, reduction="sum"))
        correct += int((logits.argmax(1) == y).sum())
    total = data.test_targets.size
    return loss / total, correct / total


def _flat(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay the targets of all examples in one row, whether each has one or many."""
    return logits.flatten(0, -2), targets.flatten()


class _Optimizer:
    """SGD or Adam on the flat vector, by PyTorch's functional forms.

    To the bit what its classes do; these import its compiler, for seconds in every
    process that trains.
    """

    def __init__(
        self,
        vector: torch.nn.Parameter,
        config: TrainingConfig,
        lr: float,
        moments: dict[str, np.ndarray] | None,
    ) -> None:
        self.vector = vector
        self.config = config
        self.lr = lr
        # Copies: steps are taken in place, and the round may come to nothing.
        self._state: dict[str, torch.Tensor] = {
            name: torch.tensor(value, device="cpu" if name == "step" else vector.device)
            for name, value in (moments or {}).items()
        }
        if config.optimizer == "adam" and not self._state:
            self._state = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(vector),
                "exp_avg_sq": torch.zeros_like(vector),
            }

    @torch.no_grad()
    def step(self) -> None:
        """Take a step along the vector's gradient."""
        assert self.vector.grad is not None
        values, gradients = [self.vector], [self.vector.grad]
        if self.config.optimizer == "adam":
            adam(
                values,
                gradients,
                [self._state["exp_avg"]],
                [self._state["exp_avg_sq"]],
                [],
                [self._state["step"]],
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=self.lr,
                weight_decay=self.config.weight_decay,
                eps=1e-8,
                maximize=False,
            )
            return
        buffers = [self._state.get("momentum_buffer")]
        sgd(
            values,
            gradients,
            buffers,
            weight_decay=self.config.weight_decay,
            momentum=self.config.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if buffers[0] is not None:
            self._state["momentum_buffer"] = buffers[0]

    def moments(self) -> dict[str, np.ndarray]:
        """Return what the next round's optimiser goes on from."""
        return {name: value.cpu().numpy() for name, value in self._state.items()}


def _seed_draws(seed: int, device: torch.device) -> None:
    """Seed what PyTorch draws by itself, as far as the model's device can draw.

    ``torch.manual_seed`` also notes down, with a stack trace each, what other devices
    are to be seeded with once they wake up, which costs a millisecond and is kept.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager:
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _set_precision(precision: str) -> None:
    # Convolutions use TF32 unless told otherwise. Deterministic kernels, so that the
    # same seed gives the same history on a GPU too.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.deterministic = True
