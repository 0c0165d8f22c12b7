"""Tests of the server's optimisers, against slow references and Flower's own."""

import copy
from typing import Any
from unittest.mock import create_autospec

import numpy as np
import pytest
from federation import scripted
from flwr.common import (
    Code,
    FitRes,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAdagrad, FedAvgM, FedYogi
from numpy.testing import assert_allclose, assert_array_equal

from gwpf_baseline.learning.server_optimizer import (
    OPTIMIZERS,
    ServerOptimizer,
    ServerOptimizerConfig,
)
from gwpf_baseline.utils import ConfigError

ADAPTIVE = ["fedadagrad", "fedadam", "fedyogi"]


def _updates(rounds: int, size: int = 12) -> np.ndarray:
    rng = np.random.default_rng(5)
    return (0.1 * rng.normal(size=(rounds, size))).astype(np.float32)


def _reference(config: ServerOptimizerConfig, updates: np.ndarray) -> list[float]:
    """Algorithm 2 of Reddi et al., a coordinate and a round at a time."""
    weights = []
    for column in updates.T.tolist():
        x, m, v = 1.0, 0.0, config.tau**2
        for delta in column:
            if config.name == "fedavg":
                m = delta
            elif config.name == "fedavgm":
                m = config.beta1 * m + delta
            else:
                m = config.beta1 * m + (1 - config.beta1) * delta
            if config.name == "fedadagrad":
                v = v + delta**2
            elif config.name == "fedadam":
                v = config.beta2 * v + (1 - config.beta2) * delta**2
            elif config.name == "fedyogi":
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - config.beta2) * delta**2 * sign
            divisor = v**0.5 + config.tau if config.name in ADAPTIVE else 1.0
            x += config.lr * m / divisor
        weights.append(x)
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_steps_are_those_of_the_paper(name: str, beta1: float) -> None:
    """Whole vectors as well as block by block."""
    config = ServerOptimizerConfig(name, lr=0.3, beta1=beta1, beta2=0.97, tau=1e-2)
    updates = _updates(20)
    whole, parts = np.ones(12, np.float32), np.ones(12, np.float32)
    one, other = ServerOptimizer(config, 12), ServerOptimizer(config, 12)
    for update in updates:
        one.step(whole, slice(None), update)
        other.step(parts, np.arange(5), update[:5])
        other.step(parts, np.arange(5, 12), update[5:])
    assert_allclose(whole, _reference(config, updates), rtol=1e-5, atol=1e-5)
    assert_array_equal(whole, parts)


def _flower(strategy: Any, updates: np.ndarray) -> np.ndarray:
    """Let one of Flower's strategies aggregate one client a round."""
    weights = np.ones(12, np.float32)
    proxy = create_autospec(ClientProxy, instance=True)
    for number, update in enumerate(updates, start=1):
        trained = ndarrays_to_parameters([weights + update])
        result = FitRes(Status(Code.OK, ""), trained, 1, {})
        parameters, _ = strategy.aggregate_fit(number, [(proxy, result)], [])
        assert parameters is not None
        weights = parameters_to_ndarrays(parameters)[0]
    return weights


def test_they_agree_with_flowers_own() -> None:
    """Where Flower follows the paper; its FedAdam corrects for the start at 0."""
    updates = _updates(15)
    initial = ndarrays_to_parameters([np.ones(12, np.float32)])
    # Flower starts the second moment at 0, which a tiny tau does here too.
    ours: dict[str, np.ndarray] = {}
    for name, beta1 in (("fedavgm", 0.9), ("fedadagrad", 0.0), ("fedyogi", 0.9)):
        optimizer = ServerOptimizer(
            ServerOptimizerConfig(name, lr=0.1, beta1=beta1, tau=1e-7), 12
        )
        ours[name] = np.ones(12, np.float32)
        for update in updates:
            optimizer.step(ours[name], slice(None), update)
    adaptive: dict[str, Any] = {"initial_parameters": initial, "eta": 0.1, "tau": 1e-7}
    theirs = {
        "fedavgm": FedAvgM(
            initial_parameters=initial, server_learning_rate=0.1, server_momentum=0.9
        ),
        "fedadagrad": FedAdagrad(**adaptive),
        "fedyogi": FedYogi(**adaptive, beta_1=0.9, beta_2=0.99),
    }
    for name, strategy in theirs.items():
        assert_allclose(ours[name], _flower(strategy, updates), rtol=1e-4)


def test_what_is_not_synchronised_stands_still() -> None:
    """Neither the value nor the moments of a coordinate without an update move."""
    config = ServerOptimizerConfig("fedadam", lr=0.1, beta1=0.9)
    optimizer, weights = ServerOptimizer(config, 4), np.ones(4, np.float32)
    optimizer.step(weights, slice(None), np.full(4, 0.5, np.float32))
    before = weights.copy(), optimizer.velocity.copy(), optimizer.second.copy()
    optimizer.step(weights, np.array([1, 2]), np.full(2, 0.5, np.float32))
    for array, old in zip(
        (weights, optimizer.velocity, optimizer.second), before, strict=True
    ):
        assert_array_equal(array[[0, 3]], old[[0, 3]])
        assert np.all(array[[1, 2]] != old[[1, 2]])


@pytest.mark.parametrize(
    "method", ["fedavg", "gwpf_paper", "apf", "gaia", "gradient_pruning", "cmfl"]
)
def test_every_method_can_use_one(method: str) -> None:
    """The model moves by the optimiser's step instead of by the mean update."""

    def script(client: int, exchange: int) -> np.ndarray:
        return np.full((1, 24), 0.5, np.float32)

    options = {"thaw_exchange": "next_round"} if method == "gwpf_paper" else {}
    config = ServerOptimizerConfig("fedadagrad", lr=0.1, tau=1e-3)
    federation = scripted(method, script, options, server_optimizer=config)
    federation.play()
    expected = 1 + 0.1 * 0.5 / ((1e-6 + 0.25) ** 0.5 + 1e-3)
    assert_allclose(federation.strategy.weights, expected, rtol=1e-5)
    # All clients follow.
    federation.play()
    for node in federation.nodes:
        assert_allclose(node.state.arrays.get("weights", expected), expected, rtol=1e-5)


def test_moments_are_in_the_state() -> None:
    """A resumed server goes on with the same steps."""

    def script(client: int, exchange: int) -> np.ndarray:
        return np.random.default_rng([client, exchange]).normal(size=(1, 24))

    config = ServerOptimizerConfig("fedyogi", lr=0.1, beta1=0.9)
    first = scripted("fedavg", script, server_optimizer=config).strategy
    for update in _updates(3, 24):
        first.move(update)
    second = scripted("fedavg", script, server_optimizer=config).strategy
    second.load_state(copy.deepcopy(first.state()))
    update = _updates(1, 24)[0]
    for strategy in (first, second):
        strategy.move(update)
    assert_array_equal(second.weights, first.weights)
    moments = first.optimizer.state()
    for name, moment in second.optimizer.state().items():
        assert moment.size == 24
        assert_array_equal(moment, moments[name])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "adam"),
        ("lr", 0),
        ("lr", None),
        ("beta1", 1),
        ("beta2", -0.1),
        ("beta2", True),
        ("tau", 0),
        ("tau", 1e-46),
    ],
)
def test_a_wrong_value_is_named(key: str, value: Any) -> None:
    """One line says which."""
    shown = "server_optimizer" if key == "name" else f"server_optimizer.{key}"
    with pytest.raises(ConfigError, match=f"^{shown}="):
        ServerOptimizerConfig(**{key: value})
