"""The methods: one file a paper, both halves in it."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from torch import nn

from gwpf_baseline.learning.client import SyncClient
from gwpf_baseline.strategy import SyncStrategy
from gwpf_baseline.utils import ConfigError


def _as_it_is(model: nn.Module, config: Any, seed: int) -> nn.Module:
    del config, seed
    return model


class Method(NamedTuple):
    """What a method's file exports as ``METHOD``.

    Parameters
    ----------
    config : type
        The frozen dataclass of hyper-parameters; it checks its own values.
    strategy : callable
        The server's half; takes a `config` beside :class:`SyncStrategy`'s arguments.
    client : callable
        The client's half; takes a `config` beside :class:`SyncClient`'s arguments.
    adapt : callable, optional
        From a model with its initial weights, the `config` and the run's seed to the
        model that the method trains, exchanges and measures. Default: the same.
    """

    config: type
    strategy: Callable[..., SyncStrategy]
    client: Callable[..., SyncClient]
    adapt: Callable[[nn.Module, Any, int], nn.Module] = _as_it_is


def method_files() -> list[str]:
    """Return the names of this package's files that hold a method, sorted."""
    return sorted(i.name for i in pkgutil.iter_modules(__path__) if not i.ispkg)


def load_method(options: dict[str, Any]) -> tuple[Method, Any]:
    """Find a method's file and build its hyper-parameters.

    Parameters
    ----------
    options : dict
        The configuration group ``method``: ``name`` (of the variant), ``module`` (the
        file in this package) and the hyper-parameters.

    Returns
    -------
    method : Method
        The method's classes.
    config : object
        An instance of ``method.config``.

    Raises
    ------
    ConfigError
        An unknown module or hyper-parameter, or a value out of range.
    """
    module = options.get("module")
    known = method_files()
    if module not in known:
        raise ConfigError("method.module", module, f"one of {', '.join(known)}")
    method: Method = importlib.import_module(f"{__name__}.{module}").METHOD
    values = {k: v for k, v in options.items() if k not in ("name", "module")}
    names = [field.name for field in fields(method.config)]
    for key, value in values.items():
        if key not in names:
            raise ConfigError(f"method.{key}", value, f"one of {', '.join(names)}")
    return method, method.config(**values)
