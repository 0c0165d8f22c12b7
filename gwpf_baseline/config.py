"""The configuration: found, composed, checked, and explained in one line when wrong."""

import functools
import glob
import json
import math
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
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gwpf_baseline.data.settings import SOURCES
from gwpf_baseline.data.task import TaskData
from gwpf_baseline.dataset import load_data, partition_indices
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.exchange.quantization import Quantization
from gwpf_baseline.exchange.roster import check_sampling
from gwpf_baseline.learning.method_server import check_weighting
from gwpf_baseline.learning.norm_bound import check_multiple
from gwpf_baseline.learning.server_optimizer import ServerOptimizerConfig
from gwpf_baseline.learning.training import TrainingConfig
from gwpf_baseline.methods import Method, load_method
from gwpf_baseline.model import initial_model
from gwpf_baseline.records.target import check_target
from gwpf_baseline.utils import ConfigError, check_yaml, is_name, is_number, is_whole

BACKENDS = ("ray", "local")
# Not the CPUs of this machine: results depend on it, and have to be repeated on others.
_MOST_THREADS = 256
_BUILDING = threading.Lock()
_PATHS = ("dataset.path", "dataset.cache_dir", "resume")
_ADDRESS = re.compile(r"local|auto|[\w.\[\]:-]+:\d{1,5}")
# What may change when a run is resumed: nothing that its history depends on.
RESUMABLE = {
    "resume",
    "num_rounds",
    "stop_at",
    "checkpoint_every",
    "layers_every",
    "client_resources",
    "client_resources.num_cpus",
    "client_resources.num_gpus",
    "connect_timeout",
    "round_timeout",
    "max_empty_rounds",
    "backend",
    "ray",
    "ray.address",
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
    # Whatever Hydra stumbles over: it raises more than it says.
    except Exception as error:
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
    overrides = [f"{key}={_plain(key, value)}" for key, value in values.items()]
    return checked(compose_config([*overrides, *more]))


def _plain(key: str, value: Any) -> str:
    if key in _PATHS and value != "null":
        # A path is a text for Hydra, whatever it holds.
        quoted = str(value).replace("'", r"\'")
        return f"'{quoted}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_config_error(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """Say in one line what is wrong with an override.

    Parameters
    ----------
    error : Exception
        What Hydra or OmegaConf raised; of an OSError, when it made the run's folder.
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
    given = dict(text.lstrip("+~").partition("=")[::2] for text in overrides)
    # Hydra's logging tells a folder that it cannot write to by another error's cause.
    system = error if isinstance(error, OSError) else error.__cause__
    # The system's own: Hydra has one for a missing file, too.
    if isinstance(system, OSError) and system.strerror:
        # Not named where the disk is full.
        folder = system.filename or given.get("hydra.run.dir", "outputs")
        allowed = f"one to write to ({system.strerror}), by hydra.run.dir=..."
        return ConfigError("output folder", folder, allowed)
    unknown = re.match("Could not override '(.+)'", str(error))
    if unknown:
        key = unknown[1]
        allowed = "one of the keys that --cfg job shows"
        return ConfigError(key, given.get(key, ""), allowed)
    if str(error).startswith("Config group override must be"):
        for group, value in given.items():
            if _choices(group) and value not in _choices(group):
                allowed = f"one of {', '.join(_choices(group))}"
                return ConfigError(group, value, allowed)
    text = " ".join(str(error.__cause__ or error).split())
    # OmegaConf adds where in its own tree the value stands, which says nothing new.
    return ConfigError("overrides", text.partition(" full_key:")[0], "key=value")


def _choices(group: str) -> list[str]:
    return sorted(
        file.stem for file in config_dir().glob(f"{glob.escape(group)}/*.yaml")
    )


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
    _check_keys(OmegaConf.to_container(cfg))
    _check_size("", OmegaConf.to_container(cfg))
    for key in _PATHS:
        value = OmegaConf.select(cfg, key)
        if value is not None:
            OmegaConf.update(cfg, key, _absolute(key, value))
    check_sampling(cfg.num_clients, cfg.fraction_fit)
    for key, least, whole in (
        ("num_rounds", 1, True),
        ("seed", 0, True),
        ("eval_every", 1, True),
        ("max_empty_rounds", 1, True),
        ("checkpoint_every", 0, True),
        ("layers_every", 0, True),
        ("client_resources.num_cpus", 1, True),
        ("client_resources.num_gpus", 0, False),
        ("client_threads", 1, True),
        ("connect_timeout", 0, False),
    ):
        value = OmegaConf.select(cfg, key)
        number = is_whole(value) if whole else is_number(value)
        if not number or not value >= least:
            kind = "a whole number" if whole else "a number"
            raise ConfigError(key, value, f"{kind} >= {least}")
    if cfg.round_timeout is not None and (
        not is_number(cfg.round_timeout) or not cfg.round_timeout > 0
    ):
        raise ConfigError("round_timeout", cfg.round_timeout, "seconds > 0, or null")
    for key, most in (
        ("client_threads", _MOST_THREADS),
        ("connect_timeout", threading.TIMEOUT_MAX),
        ("round_timeout", threading.TIMEOUT_MAX),
    ):
        if (cfg[key] or 0) > most:
            raise ConfigError(key, cfg[key], f"at most {most:.0f}")
    check_weighting(cfg.weighting)
    check_multiple(cfg.norm_bound)
    if cfg.backend not in BACKENDS:
        raise ConfigError("backend", cfg.backend, f"one of {', '.join(BACKENDS)}")
    address = cfg.ray.address
    if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
        allowed = "local, auto, or the host:port of a Ray cluster's head"
        raise ConfigError("ray.address", address, allowed)
    source = cfg.dataset.get("source")
    if cfg.stop_at is not None and source in SOURCES:
        check_target("stop_at", cfg.stop_at, SOURCES[source].metric)
    _check_resources(cfg)
    network_config(cfg)
    quantization_config(cfg)
    server_optimizer_config(cfg)
    training_config(cfg)
    _, method_config = load_method(_plain_dict(cfg.method))
    for field in fields(method_config):
        if field.name not in cfg.method:
            raise ConfigError(f"method.{field.name}", "nothing", "given")
    return cfg


def _check_keys(given: Any) -> None:
    """Check that each key is one of those in the files, and none of these is lacking.

    The keys of ``dataset`` and of ``method`` are those of other kinds of files, whose
    own checks know them.
    """
    defaults, known = _keys_of("config")
    groups = [name for entry in defaults for name in entry if name != "experiment"]
    # A group that is not given is told what it can be, below.
    _compare("", {**given, **dict.fromkeys(groups)}, {**known, **dict.fromkeys(groups)})
    for group in groups:
        options = given.get(group)
        if not isinstance(options, dict):
            allowed = f"one of {', '.join(_choices(group))}"
            raise ConfigError(group, options, allowed)
        name = options.get("name")
        if not is_name(name):
            raise ConfigError(f"{group}.name", name, "a word")
        if group in ("dataset", "method"):
            continue
        if name not in _choices(group):
            raise ConfigError(group, name, f"one of {', '.join(_choices(group))}")
        _compare(group, options, _keys_of(f"{group}/{name}")[1])


@functools.cache
def _keys_of(file: str) -> tuple[list, dict]:
    """Return a configuration file's list of groups, if it has one, and its own keys."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / f"{file}.yaml"))
    groups = [entry for entry in loaded.pop("defaults", []) if entry != "_self_"]
    loaded.pop("hydra", None)
    return groups, loaded


def _compare(key: str, given: Any, known: Any) -> None:
    """Check that a value is of the kind that a configuration file has there."""
    if isinstance(known, dict):
        if not isinstance(given, dict):
            raise ConfigError(key, given, f"given by {', '.join(known)}")
        for name in [*given, *known]:
            inner = f"{key}.{name}".removeprefix(".")
            if name not in given:
                raise ConfigError(inner, "nothing", "given")
            if name not in known:
                allowed = f"one of {', '.join(known)}"
                if "name" in known:
                    allowed = f"left out for {known['name']}"
                raise ConfigError(inner, given[name], allowed)
            _compare(inner, given[name], known[name])
    elif isinstance(known, list) and not isinstance(given, list):
        raise ConfigError(key, given, "a list, as in [20,30]")
    elif isinstance(known, bool) and not isinstance(given, bool):
        raise ConfigError(key, given, "true or false")
    elif is_number(known) and isinstance(given, bool):
        raise ConfigError(key, given, "a number")


def _check_size(key: str, value: Any) -> None:
    """Check that numbers fit where libraries put them; Python's have no end."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_size(f"{key}.{name}".removeprefix("."), inner)
    elif is_number(value) and 2**63 <= abs(value) < math.inf:
        raise ConfigError(key, value, "a number below 2**63")


def _absolute(key: str, folder: Any) -> str:
    if not (isinstance(folder, str) and folder) and not is_whole(folder):
        raise ConfigError(key, folder, "a folder, or null")
    # A worker process may stand in another folder. Nobody's home stays as it is.
    absolute = Path(os.path.expanduser(str(folder))).absolute()
    try:
        absolute.is_dir()
    except PermissionError:
        pass  # Whoever needs it will say so: a client may not.
    except OSError as error:
        allowed = f"a folder, or null ({error.strerror})"
        raise ConfigError(key, folder, allowed) from error
    return str(absolute)


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
    gpus = cfg.client_resources.num_gpus
    if gpus > torch.cuda.device_count() or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(
            "client_resources.num_gpus",
            gpus,
            f"a share of one GPU, or whole ones of {torch.cuda.device_count()}",
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
        Not a run's folder, an override that would change the run's history, or a saved
        value that cannot be used.
    """
    saved = _saved_config(Path(cfg.resume))
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        value = OmegaConf.select(cfg, key)
        before = OmegaConf.select(saved, key)
        if key in RESUMABLE:
            OmegaConf.update(saved, key, value)
        elif value != before:
            raise ConfigError(key, value, f"{before}, as in the run to resume")
    # An experiment is no key, but many values.
    if any(override.lstrip("+").startswith("experiment=") for override in overrides):
        _check_same(saved, cfg)
    try:
        return checked(saved)
    # The command line itself has been checked before.
    except ConfigError as error:
        allowed = f"a run's folder, whose config.yaml can be used ({error})"
        raise ConfigError("resume", cfg.resume, allowed) from error


def check_same_run(cfg: DictConfig) -> None:
    """Check that a run which goes on is configured as it was.

    For ``flwr run``, whose clients know the run configuration but not the saved one.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration; its ``resume`` is the run's folder.

    Raises
    ------
    ConfigError
        Not a run's folder, or a value that would change the run's history.
    """
    _check_same(_saved_config(Path(cfg.resume)), cfg)


def _check_same(saved: DictConfig, cfg: DictConfig) -> None:
    before, now = _leaves(saved), _leaves(cfg)
    for key in sorted(before.keys() | now.keys()):
        if key not in RESUMABLE and before.get(key) != now.get(key):
            allowed = f"{before.get(key)}, as in the run to resume"
            raise ConfigError(key, now.get(key), allowed)


def _leaves(cfg: DictConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in cfg.items_ex(resolve=False):
        if isinstance(value, DictConfig):
            below = _leaves(value).items()
            found |= {f"{key!s}.{name}": leaf for name, leaf in below}
        else:
            found[str(key)] = value
    return found


def _saved_config(folder: Path) -> DictConfig:
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError("resume", folder, "the folder of a run")
    try:
        check_yaml(file.read_text(encoding="utf-8"))
        saved = OmegaConf.load(file)
    # PyYAML, too, raises more than it says.
    except Exception as error:
        allowed = f"a run's folder, whose config.yaml can be read ({error})"
        raise ConfigError("resume", folder, allowed) from error
    if not isinstance(saved, DictConfig):
        allowed = "a run's folder, whose config.yaml has keys"
        raise ConfigError("resume", folder, allowed)
    return saved


def training_config(cfg: DictConfig) -> TrainingConfig:
    """Return the part of the configuration that the local loop needs."""
    names = [field.name for field in fields(TrainingConfig)]
    return TrainingConfig(**{name: cfg[name] for name in names})


def quantization_config(cfg: DictConfig) -> Quantization:
    """Return how values travel."""
    return Quantization(**_plain_dict(cfg.quantization))


def server_optimizer_config(cfg: DictConfig) -> ServerOptimizerConfig:
    """Return how the mean update moves the model."""
    return ServerOptimizerConfig(**_plain_dict(cfg.server_optimizer))


def network_config(cfg: DictConfig) -> Network | None:
    """Return the network to model, None if no bandwidth is set.

    Raises
    ------
    ConfigError
        A value that is not allowed, or a list of another length than `num_clients`.
    """
    options: Any = OmegaConf.to_container(cfg.network)
    unset = options["uplink_mbps"] is None and options["downlink_mbps"] is None
    if unset:  # the rest is checked all the same
        options |= {"uplink_mbps": 1, "downlink_mbps": 1}
    network = Network(**options, seed=cfg.seed)
    for key, value in options.items():
        if isinstance(value, list) and len(value) != cfg.num_clients:
            allowed = f"a number, or a list of {cfg.num_clients}, one for each client"
            raise ConfigError(f"network.{key}", value, allowed)
    return None if unset else network


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
    training : TrainingConfig
        What the local loop needs.
    quantization : Quantization
        How values travel.
    """

    data: TaskData
    partitions: list
    model: torch.nn.Module
    method: Method
    method_config: Any
    training: TrainingConfig
    quantization: Quantization


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
    return Workbench(
        data,
        partitions,
        model,
        method,
        method_config,
        training_config(cfg),
        quantization_config(cfg),
    )
