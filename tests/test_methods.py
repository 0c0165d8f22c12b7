"""The contract of a method: a whole one that runs, and what is the same for most."""

import doctest
from typing import Any

import numpy as np
import pytest
from federation import scripted, small
from numpy.testing import assert_allclose, assert_array_equal
from ternary_rounds import walk

import gwpf_baseline.methods
from gwpf_baseline.learning.training import TrainingConfig

# Those whose clients keep nothing of their own in the model that they train on, with
# what leaves something pending of what the scripted clients learn. `gwpf_paper` has a
# reference of its own.
FROM_THE_MODEL: dict[str, dict[str, Any]] = {
    "apf": {"check_every": 1, "ema": 0.5, "threshold": 0.7},
    "cmfl": {"threshold": 0.5},
    "fedavg": {},
    "gradient_pruning": {"keep": 0.25},
    "gwpf": {"vote_fraction": 0.25, "thaw_budget": 0.25},
    "signsgd": {"step": 0.1},
    "stc": {"up": 0.25, "down": 0.25},
    "zerofl": {"sparsity": 0.5, "mask_ratio": 0.1, "upload": "diff_on_top_k"},
}


def test_the_toy_method_in_the_docstring_runs() -> None:
    """Word for word, with real data and real bytes."""
    result = doctest.testmod(gwpf_baseline.methods)
    assert result.attempted > 10 and not result.failed


@pytest.mark.parametrize("method", FROM_THE_MODEL)
def test_clients_start_from_the_global_model(method: str) -> None:
    """To the bit; what is pending is not in what a client trains on."""
    federation = scripted(method, walk, FROM_THE_MODEL[method])
    for _ in range(5):
        model = federation.strategy.weights.numpy().copy()
        federation.play()
        for node in federation.nodes:
            assert_array_equal(node.starts[-1], model)
    pending = [node.state.arrays.get("residual") for node in federation.nodes]
    holds = method in ("apf", "gradient_pruning", "gwpf", "stc")
    assert holds == all(held is not None and held.any() for held in pending)


@pytest.mark.parametrize("method", [*FROM_THE_MODEL, "gaia"])
def test_who_has_three_times_the_examples_counts_as_three(method: str) -> None:
    """Where examples weigh; else each client is one."""
    options = FROM_THE_MODEL.get(method, {"threshold": 0.5})

    def models(people: list[int], **strategy: Any) -> np.ndarray:
        def script(client: int, exchange: int) -> np.ndarray:
            return walk(people[client], exchange)

        federation = scripted(method, script, options, len(people), **strategy)
        federation.play(6)
        return federation.strategy.weights.numpy()

    crowd = models([0, 0, 0, 1])
    weighed = models([0, 1], num_examples=[3, 1], weighting="examples")
    assert_allclose(weighed, crowd, atol=1e-5)
    assert not np.allclose(models([0, 1], num_examples=[3, 1]), crowd, atol=1e-2)


@pytest.mark.parametrize("method", ["gwpf", "gaia"])
def test_an_epoch_is_as_many_iterations_as_there_are_batches(method: str) -> None:
    """In training, in where the next round goes on, and in what a client forgets."""
    options = {"half_life": 4} if method == "gwpf" else {}
    weights = []
    for length in ({"local_epochs": 1.5}, {"local_steps": 6}):
        training = TrainingConfig(batch_size=10, **length)  # type: ignore[arg-type]
        federation = small([40, 40], training, method, options)
        federation.play(3)
        weights.append(federation.strategy.weights.numpy())
        assert [node.state.cursor for node in federation.nodes] == [180, 180]
    assert_array_equal(*weights)
