"""The methods: one file a paper, both halves in it.

A method is a configuration, a strategy and a client. The strategy says what becomes of
uploads (:class:`~gwpf_baseline.learning.method_server.MethodServer` lists all that it
can decide), the client what it uploads. Here is a whole one, in which clients send
signs, and the model moves by their mean:

>>> from dataclasses import dataclass
>>> import numpy as np
>>> from gwpf_baseline.exchange.messages import EVERYTHING
>>> from gwpf_baseline.exchange.payload import Part
>>> from gwpf_baseline.learning.client import SyncClient
>>> from gwpf_baseline.methods import Method
>>> from gwpf_baseline.strategy import SyncStrategy

>>> @dataclass(frozen=True)
... class MeanSignConfig:
...     step: float = 0.002

>>> class MeanSignStrategy(SyncStrategy):
...     name = "mean_sign"
...
...     def reset_sums(self):
...         self.signs = np.zeros(self.dimension, np.float32)
...
...     def read_upload(self, reader):
...         return reader.bitmap(self.dimension, part=Part.VALUES)
...
...     def add_upload(self, upload, weight):
...         self.signs += np.where(upload, weight, -weight)
...
...     def finish_exchange(self, total_weight):
...         self.move(np.float32(self.config.step / total_weight) * self.signs)
...         return EVERYTHING

>>> class MeanSignClient(SyncClient):
...     name = "mean_sign"
...
...     def upload(self, task, state, writer):
...         delta, loss = self.train(task.weights, task, state)
...         writer.bitmap(delta.numpy() > 0, part=Part.VALUES)
...         return loss

>>> METHOD = Method(MeanSignConfig, MeanSignStrategy, MeanSignClient)

In ``methods/mean_sign.py``, with ``conf/method/mean_sign.yaml`` beside the others (its
``name``, the ``module`` and the hyper-parameters), ``method=mean_sign`` runs it on any
data and model, counted, recorded and compared like all others. Or by hand, in this
process:

>>> from dataclasses import replace
>>> from gwpf_baseline.config import checked, compose_config, workbench
>>> from gwpf_baseline.local import federation
>>> cfg = checked(compose_config(["num_clients=4", "local_steps=2"]))
>>> bench = replace(workbench(cfg), method=METHOD, method_config=MeanSignConfig())
>>> record = federation(cfg, bench).play(rounds=3)
>>> record.clients, record.failures, round(record.uplink_bits_per_parameter, 1)
(4, 0, 0.9)
"""

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
            allowed = f"one of {', '.join(names)}"
            if not names:
                allowed = f"left out, as {module} has no hyper-parameters"
            raise ConfigError(f"method.{key}", value, allowed)
    return method, method.config(**values)
