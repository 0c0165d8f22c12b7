"""The Flower ServerApp: builds the strategy, runs the rounds, writes the records."""

import copy
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.server import Server, ServerConfig, SimpleClientManager
from flwr.server.compat import start_grid
from flwr.serverapp import Grid, ServerApp
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gwpf_baseline.callbacks import (
    Checkpoints,
    Evaluation,
    Layers,
    OnRound,
    StopAt,
)
from gwpf_baseline.config import (
    Workbench,
    check_same_run,
    from_run_config,
    network_config,
    server_optimizer_config,
    workbench,
)
from gwpf_baseline.learning.flat_model import FlatModel, to_ndarrays
from gwpf_baseline.learning.state import STATE_FOLDER
from gwpf_baseline.learning.training import evaluate
from gwpf_baseline.methods.shared.network_file import NETWORK_FILE
from gwpf_baseline.records.checkpoint import (
    CheckpointFolder,
    StateError,
    round_of,
    write_tensors,
)
from gwpf_baseline.records.display import Display, closing_table
from gwpf_baseline.records.history import SUMMARY_FILE, History
from gwpf_baseline.records.layers import LAYERS_FILE
from gwpf_baseline.strategy import Callback, SyncStrategy
from gwpf_baseline.utils import ConfigError, pick_device, run_folder

log = logging.getLogger(__name__)


MODEL_FILE = "model.safetensors"
_MOST_MESSAGES = 128  # on their way at a time, to nodes of a grid


# Plays the rounds of a Flower server whose nodes it knows.
Play = Callable[[Server, ServerConfig], object]


def limit_messages(server: Server, at_once: int) -> None:
    """Limit how many messages of any exchange are on their way at a time.

    Parameters
    ----------
    server : flwr.server.Server
        The server.
    at_once : int
        The limit.
    """
    server.set_max_workers(at_once)
    # Of one of Flower's own it plays all exchanges itself.
    if isinstance(server.strategy, SyncStrategy):
        server.strategy.at_once = at_once


def on_grid(grid: Grid) -> Play:
    """Return what plays the rounds with the nodes of a Flower grid."""

    def play(server: Server, config: ServerConfig) -> None:
        # Every client of a round is under way at once; Flower queues them.
        limit_messages(server, _MOST_MESSAGES)
        start_grid(grid=grid, server=server, config=config)

    return play


class Evaluator:
    """Measures the global model on the test set every few rounds, and at the end.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    bench : Workbench
        The data and the model.
    """

    def __init__(self, cfg: DictConfig, bench: Workbench) -> None:
        self.every = cfg.eval_every
        self.last = cfg.num_rounds
        self.data = bench.data
        device = pick_device(cfg.client_resources.num_gpus)
        # A copy: the next run of this process starts from the initial weights too.
        self.model = FlatModel(copy.deepcopy(bench.model), device)

    def __call__(
        self, server_round: int, weights: torch.Tensor, buffers: torch.Tensor
    ) -> tuple[float, float] | None:
        """Return test loss and accuracy, None in a round that is not measured."""
        if server_round % self.every and server_round != self.last:
            return None
        self.model.load(weights, buffers)
        return evaluate(self.model, self.data)


def make_strategy(
    cfg: DictConfig, bench: Workbench, callbacks: Sequence[Callback] = ()
) -> SyncStrategy:
    """Build the strategy that a configuration describes.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    bench : Workbench
        The data, the model and the method.
    callbacks : sequence of Callback, default none
        What happens around each round.

    Returns
    -------
    SyncStrategy
        The configured method's strategy.
    """
    return bench.method.strategy(
        bench.model,
        config=bench.method_config,
        num_clients=cfg.num_clients,
        fraction_fit=cfg.fraction_fit,
        seed=cfg.seed,
        weighting=cfg.weighting,
        num_examples=[len(rows) for rows in bench.partitions],
        norm_bound=cfg.norm_bound,
        max_empty_rounds=cfg.max_empty_rounds,
        server_optimizer=server_optimizer_config(cfg),
        quantization=bench.quantization,
        network=network_config(cfg),
        callbacks=callbacks,
        connect_timeout=cfg.connect_timeout,
        round_timeout=cfg.round_timeout,
    )


def run_server(
    cfg: DictConfig, play: Play, folder: Path, console: Console
) -> dict[str, Any]:
    """Run all rounds of an experiment and write the files of the run.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    play : callable
        Connects a Flower server with its nodes and plays the rounds.
    folder : pathlib.Path
        The run's folder.
    console : rich.console.Console
        Where to show progress and the closing table.

    Returns
    -------
    dict
        The contents of ``summary.json``.

    Raises
    ------
    ConfigError
        Another run writes to the folder, or what is to be resumed is none of this
        configuration, or has reached its target.
    RunError
        Too many rounds in a row had no sound answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        return _run(cfg, play, folder, console)


def _run(cfg: DictConfig, play: Play, folder: Path, console: Console) -> dict[str, Any]:
    bench = workbench(cfg)
    history = History(folder)
    metric = bench.data.metric
    display = Display(cfg.num_rounds, console, metric)
    callbacks: list[Callback] = [
        Evaluation(Evaluator(cfg, bench)),
        OnRound(history.add),
        OnRound(display.update),
    ]
    if cfg.checkpoint_every:
        callbacks.append(Checkpoints(CheckpointFolder(folder), cfg.checkpoint_every))
    stop = None if cfg.stop_at is None else StopAt(cfg.stop_at, metric)
    if stop is not None:
        callbacks.append(stop)
    strategy = make_strategy(cfg, bench, callbacks)
    if cfg.resume:
        _resume(strategy, cfg, stop)
    _take_over(folder, cfg)
    history.restore(strategy.records)
    if cfg.layers_every:
        strategy.callbacks.append(Layers(strategy, folder, cfg.layers_every))
    remaining = cfg.num_rounds - len(strategy.records)
    server = Server(client_manager=SimpleClientManager(), strategy=strategy)
    with display:
        play(server, ServerConfig(remaining, cfg.round_timeout))
    history.close()
    summary = _write_results(cfg, bench, strategy, history, folder)
    console.print(closing_table(summary))
    console.print(f"Results are in {folder}", soft_wrap=True, markup=False)
    return summary


def _resume(strategy: SyncStrategy, cfg: DictConfig, stop: StopAt | None) -> None:
    """Let a strategy go on from the checkpoint that is configured."""
    try:
        strategy.load_state(CheckpointFolder(cfg.resume).server_state())
    except StateError as error:
        allowed = f"the folder of a run of this configuration ({error})"
        raise ConfigError("resume", cfg.resume, allowed) from error
    # It may have been killed after its last round.
    if stop is not None and strategy.records:
        strategy.finished = stop.after_round(strategy, strategy.records[-1])
    if strategy.finished and Path(cfg.resume, SUMMARY_FILE).exists():
        allowed = "null, or a target that the run has not reached"
        raise ConfigError("stop_at", cfg.stop_at, allowed)


def _write_results(
    cfg: DictConfig,
    bench: Workbench,
    strategy: SyncStrategy,
    history: History,
    folder: Path,
) -> dict[str, Any]:
    """Write what a run leaves behind at its end; return the summary."""
    save_model(strategy, folder / MODEL_FILE)
    # Takes half a second, which no run has to wait for at its start.
    # pylint: disable-next=import-outside-toplevel
    from gwpf_baseline.records.plots import plot_history

    plot_history(history.records, folder)
    options = {key: value for key, value in cfg.model.items() if key != "name"}
    strategy.export(
        folder,
        {
            "model": cfg.model.name,
            "input_shape": list(bench.data.input_shape),
            "num_classes": bench.data.num_classes,
            "options": options,
        },
    )
    # The last file, by which a run is known to be whole.
    return history.write_summary(
        method=cfg.method.name,
        dataset=cfg.dataset.name,
        model=cfg.model.name,
        seed=cfg.seed,
        parameters=strategy.dimension,
        metric=bench.data.metric,
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until this one ends, however it does."""
    if os.name != "posix":
        yield  # where folders cannot be locked
        return
    # pylint: disable-next=import-outside-toplevel
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some file systems of networks have no locks.
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                allowed = "one that no other run writes to at the moment"
                raise ConfigError("output folder", folder, allowed) from error
        yield
    finally:
        os.close(descriptor)


def _take_over(folder: Path, cfg: DictConfig) -> None:
    """Make a folder this run's: nothing of an earlier one is to be taken for its own.

    Called once nothing can keep the run from beginning, so that who mistypes an option
    loses nothing.
    """
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
    if not cfg.resume or Path(cfg.resume).resolve() != folder.resolve():
        plots = ("accuracy.png", "traffic.png", "frozen.png")
        for name in (MODEL_FILE, NETWORK_FILE, LAYERS_FILE, *plots):
            (folder / name).unlink(missing_ok=True)
        CheckpointFolder(folder).clear()
    OmegaConf.save(cfg, folder / "config.yaml")


def save_model(strategy: SyncStrategy, file: Path) -> None:
    """Write the global model under its state dict's names.

    Parameters
    ----------
    strategy : SyncStrategy
        Holds the model.
    file : pathlib.Path
        A safetensors file; ``model.load_state_dict(load_file(file))`` reads it.

    Raises
    ------
    OSError
        It cannot be written.
    """
    arrays = to_ndarrays(strategy.model, strategy.measured_weights(), strategy.buffers)
    names = strategy.model.state_dict().keys()
    tensors = {
        name: torch.from_numpy(array).clone()
        for name, array in zip(names, arrays, strict=True)
    }
    write_tensors(file, tensors)


def check_resume(cfg: DictConfig) -> None:
    """Check that there is something to resume and something left to do.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.

    Raises
    ------
    ConfigError
        No checkpoint, or all rounds are done, and all files written.
    """
    if cfg.resume:
        done = round_of(CheckpointFolder(cfg.resume).latest())
        whole = Path(cfg.resume, SUMMARY_FILE).exists()
        if done > cfg.num_rounds or (done == cfg.num_rounds and whole):
            raise ConfigError(
                "num_rounds", cfg.num_rounds, f"more than the {done} rounds done"
            )


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one experiment from Flower's run configuration."""
    cfg = from_run_config(context.run_config)
    if cfg.resume:
        check_same_run(cfg)
    check_resume(cfg)
    folder = run_folder(context.run_id)
    run_server(cfg, on_grid(grid), folder, Console())
    # Of clients that share this disk, as simulated ones do: it was for the next round.
    shutil.rmtree(folder / STATE_FOLDER, ignore_errors=True)
