"""One experiment, simulated: ``python -m gwpf_baseline.main``."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
from flwr.common import Context
from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.logging import RichHandler

from gwpf_baseline.client_app import simulated_client_app
from gwpf_baseline.config import (
    as_config_error,
    checked,
    config_dir,
    resumed,
    workbench,
)
from gwpf_baseline.local import in_process
from gwpf_baseline.server_app import check_resume, on_grid, run_server
from gwpf_baseline.utils import ConfigError, RunError


def run_experiment(cfg: DictConfig, folder: Path, console: Console) -> dict[str, Any]:
    """Run one experiment, on Flower's Ray simulation or in this process.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    folder : pathlib.Path
        The run's folder.
    console : rich.console.Console
        Where to show progress.

    Returns
    -------
    dict
        The contents of ``summary.json``.

    Raises
    ------
    ConfigError
        Data, model and partition that are not there or do not fit, before Ray starts.
    SystemExit
        Ray could not start.
    """
    check_resume(cfg)
    workbench(cfg)
    if cfg.backend == "local":
        return run_server(cfg, in_process(cfg, folder), folder, console)
    summary: dict[str, Any] = {}
    server_app = ServerApp()

    @server_app.main()
    def _(grid: Grid, context: Context) -> None:
        del context
        summary.update(run_server(cfg, on_grid(grid), folder, console))

    level = logging.INFO if cfg.verbose else logging.ERROR
    backend_config = {
        # A Ray of its own: another one on this machine may be stale, or a cluster whose
        # other nodes do not have the run's folder.
        "init_args": {
            "address": "local",
            "logging_level": level,
            "log_to_driver": cfg.verbose,
        },
        "client_resources": {
            "num_cpus": cfg.client_resources.num_cpus,
            "num_gpus": cfg.client_resources.num_gpus,
        },
    }
    _start_ray(backend_config)
    run_simulation(
        server_app=server_app,
        client_app=simulated_client_app(cfg, str(folder)),
        num_supernodes=cfg.num_clients,
        backend_config=backend_config,
        verbose_logging=cfg.verbose,
    )
    return summary


def _start_ray(backend_config: dict[str, Any]) -> None:
    # Ray would otherwise print a tip about what this does, at every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # The simulation takes a Ray that runs already. Left to start one, it starts the
    # server first, which waits for ever for the clients of a Ray that could not start.
    try:
        RayBackend(backend_config)
    # Whatever it is: where a process of its own dies, Ray raises a plain Exception.
    except Exception as error:  # pylint: disable=broad-exception-caught
        reason = str(error).partition("\n")[0].rstrip(".")
        sys.exit(
            f"error: Ray could not start: {reason}; "
            "set RAY_TMPDIR to a short path to a writable folder with room"
        )


def _set_up_logging(console: Console, verbose: bool) -> None:
    handler = RichHandler(console=console, show_path=False, log_time_format="%X")
    ours, flower = logging.getLogger("gwpf_baseline"), logging.getLogger("flwr")
    for logger in (ours, flower):
        logger.handlers = [handler]
        logger.propagate = False
    ours.setLevel(logging.INFO)
    # What a client did wrong, our own log says in one line; Flower adds tracebacks.
    flower.setLevel(logging.INFO if verbose else logging.CRITICAL)


def _job(cfg: DictConfig) -> None:
    console = Console()
    try:
        cfg = checked(cfg)
        if cfg.resume:
            cfg = resumed(cfg, HydraConfig.get().overrides.task)
        _set_up_logging(console, cfg.verbose)
        run_experiment(cfg, Path(HydraConfig.get().runtime.output_dir), console)
    except ConfigError as error:
        _exit(error)
    except RunError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Run the command line; what the user got wrong ends in one line and code 2."""
    # Hydra would print its own many lines and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    begun = False

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def job(cfg: DictConfig) -> None:
        nonlocal begun
        begun = True
        _job(cfg)

    try:
        job()  # pylint: disable=no-value-for-parameter
    # Whatever Hydra stumbles over in a command line; what ends a run is none of it.
    except Exception as error:  # pylint: disable=broad-exception-caught
        if begun:
            raise
        _exit(as_config_error(error, sys.argv[1:]))


def _exit(error: ConfigError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
