"""The configuration: found, composed, checked, and explained in one line when wrong."""

import functools
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gwpf_baseline.data.settings import SOURCES
from gwpf_baseline.data.task import TaskData
from gwpf_baseline.dataset import load_data, partition_indices
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.learning.norm_bound import check_multiple
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods import Method, load_method
from gwpf_baseline.model import initial_model
from gwpf_baseline.records.target import check_target
from gwpf_baseline.utils import ConfigError, is_number

WEIGHTINGS = ("uniform", "examples")
BACKENDS = ("ray", "local")
_BUILDING = threading.Lock()
# What may change when a run is resumed: nothing that its history depends on.
RESUMABLE = {
    "resume",
    "num_rounds",
    "stop_at",
    "checkpoint_every",
    "client_resources",
    "client_resources.num_cpus",
    "client_resources.num_gpus",
    "connect_timeout",
    "max_empty_rounds",
    "backend",
    "verbose",
}


def config_dir() -> Path:
    """Return the folder of the configuration files.

    Returns
    -------
    pathlib.Path
        ``conf`` inside the package (an installed wheel) or beside it (a checkout, or
        an app that Flower unpacked).
    """
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def compose_config(overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration without the command line.

    Parameters
    ----------
    overrides : sequence of str, default none
        Hydra overrides such as ``"method=fedavg"``.

    Returns
    -------
    DictConfig
        The configuration, composed but not checked.

    Raises
    ------
    ConfigError
        The overrides do not fit the configuration files.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise as_config_error(error, overrides) from error


def from_run_config(run_config: Mapping[str, Any]) -> DictConfig:
    """Compose the configuration from what ``flwr run --run-config`` was given.

    Parameters
    ----------
    run_config : mapping of str to object
        Flower's run configuration. ``""`` means that a key is not set; the key
        ``overrides`` holds any further Hydra overrides, separated by blanks.

    Returns
    -------
    DictConfig
        The checked configuration.
    """
    values = {key: value for key, value in run_config.items() if value != ""}
    more = str(values.pop("overrides", "")).split()
    overrides = [f"{key}={_plain(value)}" for key, value in values.items()]
    return checked(compose_config([*overrides, *more]))


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_config_error(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """Say in one line what is wrong with an override.

    Parameters
    ----------
    error : Exception
        What Hydra or OmegaConf raised.
    overrides : sequence of str, default none
        The overrides that were given, to find the value that belongs to a key.

    Returns
    -------
    ConfigError
        One line that names the key, the value and what is allowed.
    """
    if isinstance(error, MissingConfigException) and error.options:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        return ConfigError(group, value, f"one of {', '.join(sorted(error.options))}")
    unknown = re.match("Could not override '(.+)'", str(error))
    if unknown:
        key = unknown[1]
        given = dict(text.lstrip("+~").partition("=")[::2] for text in overrides)
        allowed = "one of the keys that --cfg job shows"
        return ConfigError(key, given.get(key, ""), allowed)
    text = " ".join(str(error.__cause__ or error).split())
    # OmegaConf adds where in its own tree the value stands, which says nothing new.
    return ConfigError("overrides", text.partition(" full_key:")[0], "key=value")


def checked(cfg: DictConfig) -> DictConfig:
    """Check every value, with the paths in it made absolute.

    Parameters
    ----------
    cfg : DictConfig
        A composed configuration.

    Returns
    -------
    DictConfig
        A copy that can be run.

    Raises
    ------
    ConfigError
        The first value that cannot be used.
    """
    cfg = OmegaConf.create(_resolved(cfg))
    for key in ("dataset.path", "dataset.cache_dir", "resume"):
        value = OmegaConf.select(cfg, key)
        if value is not None:
            OmegaConf.update(cfg, key, str(Path(str(value)).expanduser().absolute()))
    for key, least, whole in (
        ("num_clients", 1, True),
        ("num_rounds", 1, True),
        ("seed", 0, True),
        ("eval_every", 1, True),
        ("max_empty_rounds", 1, True),
        ("checkpoint_every", 0, True),
        ("client_resources.num_cpus", 1, True),
        ("client_resources.num_gpus", 0, False),
        ("client_threads", 1, True),
        ("connect_timeout", 0, False),
    ):
        value = OmegaConf.select(cfg, key)
        wanted = int if whole else int | float
        if not isinstance(value, wanted) or isinstance(value, bool) or value < least:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(key, value, f"{kind} >= {least}")
    if not is_number(cfg.fraction_fit) or not 0 < cfg.fraction_fit <= 1:
        raise ConfigError("fraction_fit", cfg.fraction_fit, "in (0, 1]")
    if cfg.round_timeout is not None and (
        not is_number(cfg.round_timeout) or cfg.round_timeout <= 0
    ):
        raise ConfigError("round_timeout", cfg.round_timeout, "seconds > 0, or null")
    if cfg.weighting not in WEIGHTINGS:
        raise ConfigError("weighting", cfg.weighting, f"one of {', '.join(WEIGHTINGS)}")
    check_multiple(cfg.norm_bound)
    if cfg.backend not in BACKENDS:
        raise ConfigError("backend", cfg.backend, f"one of {', '.join(BACKENDS)}")
    if not isinstance(cfg.verbose, bool):
        raise ConfigError("verbose", cfg.verbose, "true or false")
    if cfg.stop_at is not None and cfg.dataset.source in SOURCES:
        check_target("stop_at", cfg.stop_at, SOURCES[cfg.dataset.source].metric)
    _check_resources(cfg)
    network_config(cfg)
    quantization_config(cfg)
    server_optimizer_config(cfg)
    training_config(cfg)
    load_method(_plain_dict(cfg.method))
    return cfg


def _resolved(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise as_config_error(error) from error


def _check_resources(cfg: DictConfig) -> None:
    cpus = os.cpu_count() or 1
    if cfg.client_resources.num_cpus > cpus:
        raise ConfigError(
            "client_resources.num_cpus",
            cfg.client_resources.num_cpus,
            f"at most {cpus}, the CPUs of this machine",
        )
    if cfg.client_resources.num_gpus > 0 and not torch.cuda.is_available():
        raise ConfigError(
            "client_resources.num_gpus",
            cfg.client_resources.num_gpus,
            "0, as PyTorch sees no GPU on this machine",
        )


def resumed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of the run to resume, with what may change changed.

    Parameters
    ----------
    cfg : DictConfig
        The configuration of the command line; its ``resume`` is the run's folder.
    overrides : sequence of str
        The command line's overrides. Those in `RESUMABLE` take effect, others may be
        repeated as they were.

    Returns
    -------
    DictConfig
        The configuration to go on with.

    Raises
    ------
    ConfigError
        Not a run's folder, or an override that would change the run's history.
    """
    file = Path(cfg.resume) / "config.yaml"
    if not file.is_file():
        raise ConfigError("resume", cfg.resume, "the folder of a run")
    saved = OmegaConf.load(file)
    assert isinstance(saved, DictConfig)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        value = OmegaConf.select(cfg, key)
        before = OmegaConf.select(saved, key)
        if key in RESUMABLE:
            OmegaConf.update(saved, key, value)
        elif value != before:
            raise ConfigError(key, value, f"{before}, as in the run to resume")
    return saved


def training_config(cfg: DictConfig) -> TrainingConfig:
    """Return the part of the configuration that the local loop needs."""
    names = [field.name for field in fields(TrainingConfig)]
    return TrainingConfig(**{name: cfg[name] for name in names})


def quantization_config(cfg: DictConfig) -> Quantization:
    """Return how values travel."""
    return Quantization(**_group(cfg, "quantization", Quantization))


def server_optimizer_config(cfg: DictConfig) -> ServerOptimizerConfig:
    """Return how the mean update moves the model."""
    options = _group(cfg, "server_optimizer", ServerOptimizerConfig)
    return ServerOptimizerConfig(**options)


def _group(cfg: DictConfig, group: str, kind: type) -> dict[str, Any]:
    """Return a group's keys, each of which is a field of a dataclass."""
    names = [field.name for field in fields(kind)]
    if not isinstance(cfg[group], DictConfig):
        raise ConfigError(group, cfg[group], f"given by {', '.join(names)}")
    options = _plain_dict(cfg[group])
    for key, value in options.items():
        if key not in names:
            raise ConfigError(f"{group}.{key}", value, f"one of {', '.join(names)}")
    return options


def network_config(cfg: DictConfig) -> Network | None:
    """Return the network to model, None if no bandwidth is set."""
    network = _group(cfg, "network", Network)
    if network["uplink_mbps"] is None and network["downlink_mbps"] is None:
        return None
    return Network(**network)


def _plain_dict(cfg: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in cfg.items()}


@dataclass(frozen=True)
class Workbench:
    """What a process needs to play any part in a run; it can always be rebuilt.

    Parameters
    ----------
    data : TaskData
        The data set, memory mapped.
    partitions : list of numpy.ndarray
        int64, each client's rows of the training data.
    model : torch.nn.Module
        The method's model with its initial weights.
    method : Method
        The method's classes.
    method_config : object
        Its hyper-parameters.
    """

    data: TaskData
    partitions: list
    model: torch.nn.Module
    method: Method
    method_config: Any


def workbench(cfg: DictConfig) -> Workbench:
    """Build, once a process, what a checked configuration describes.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.

    Returns
    -------
    Workbench
        The data, the model and the method.

    Raises
    ------
    ConfigError
        Data that is not there, or data, model and partition that do not fit.
    """
    text = json.dumps(OmegaConf.to_container(cfg), sort_keys=True)
    # Two threads that drew initial weights at once would share one random generator.
    with _BUILDING:
        return _workbench(text)


@functools.lru_cache(maxsize=1)
def _workbench(text: str) -> Workbench:
    cfg = OmegaConf.create(json.loads(text))
    assert isinstance(cfg, DictConfig)
    data = load_data(cfg.dataset)
    partitions = partition_indices(data, cfg.partition, cfg.num_clients, cfg.seed)
    options = _plain_dict(cfg.model)
    name = options.pop("name")
    model = initial_model(name, data.input_shape, data.num_classes, cfg.seed, **options)
    method, method_config = load_method(_plain_dict(cfg.method))
    model = method.adapt(model, method_config, cfg.seed)
    return Workbench(data, partitions, model, method, method_config)
