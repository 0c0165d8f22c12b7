"""One experiment, simulated: ``python -m gwpf_baseline.main``."""

import os

# Read when PyTorch is first imported, hence before it. The server's idle threads would
# otherwise spin for a while after each operation, on the cores that the workers need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# pylint: disable=wrong-import-position
import errno  # noqa: E402
import logging  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.logging import RichHandler  # noqa: E402

from gwpf_baseline.config import (  # noqa: E402
    as_config_error,
    checked,
    config_dir,
    resumed,
    workbench,
)
from gwpf_baseline.local import in_process  # noqa: E402
from gwpf_baseline.records.checkpoint import CheckpointFolder  # noqa: E402
from gwpf_baseline.server_app import check_resume, run_server  # noqa: E402
from gwpf_baseline.utils import ConfigError, RunError  # noqa: E402


def run_experiment(cfg: DictConfig, folder: Path, console: Console) -> dict[str, Any]:
    """Run one experiment, on Ray or in this process.

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
    RunError
        Ray could not start, or too many rounds in a row had no sound answer.
    """
    check_resume(cfg)
    workbench(cfg)
    if cfg.backend == "local":
        play = in_process(cfg, folder)
    else:
        # Ray takes a second to import.
        # pylint: disable-next=import-outside-toplevel
        from gwpf_baseline.simulation import on_ray

        play = on_ray(cfg, folder)
    return run_server(cfg, play, folder, console)


def _set_up_logging(console: Console, verbose: bool) -> None:
    handler = RichHandler(console=console, show_path=False, log_time_format="%X")
    ours, flower = logging.getLogger("gwpf_baseline"), logging.getLogger("flwr")
    for logger in (ours, flower):
        logger.handlers = [handler]
        logger.propagate = False
    ours.setLevel(logging.INFO)
    # What a client did wrong, our own log says in one line; Flower adds tracebacks.
    flower.setLevel(logging.INFO if verbose else logging.CRITICAL)


def _job(cfg: DictConfig) -> int:
    """Run one job, which may be one of several; return its exit code."""
    console = Console()
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        # An empty one is the folder that the command is given in.
        if folder == Path(HydraConfig.get().runtime.cwd):
            raise ConfigError("hydra.run.dir", "", "a folder of the run's own")
        cfg = checked(cfg)
        if cfg.resume:
            cfg = resumed(cfg, HydraConfig.get().overrides.task)
        _set_up_logging(console, cfg.verbose)
        run_experiment(cfg, folder, console)
    except ConfigError as error:
        return _say(error)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk does not name the file, which is open by then.
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = str(folder)
        elif error.filename is None or folder not in Path(error.filename).parents:
            raise
        return _say(as_config_error(error))
    except KeyboardInterrupt:
        rounds = CheckpointFolder(folder).rounds()
        mend = f"; resume={folder} goes on after round {max(rounds)}" if rounds else ""
        print(f"stopped{mend}", file=sys.stderr)
        sys.exit(130)
    return 0


def main() -> None:
    """Run the command line; what the user got wrong ends in one line and code 2."""
    # Hydra would print its own many lines and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    codes = []
    begun = False

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def job(cfg: DictConfig) -> None:
        nonlocal begun
        begun = True
        # The other jobs of a sweep still have their turn.
        codes.append(_job(cfg))

    try:
        job()  # pylint: disable=no-value-for-parameter
    # Whatever Hydra stumbles over in a command line; what ends a run is none of it.
    except Exception as error:  # pylint: disable=broad-exception-caught
        if begun:
            raise
        codes.append(_say(as_config_error(error, sys.argv[1:])))
    sys.exit(max(codes, default=0))


def _say(error: ConfigError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
