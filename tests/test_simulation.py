"""Ray: what becomes of a run whose workers die, hang, or are elsewhere."""

import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from command_line import (
    SMALL,
    model_bytes,
    rows_without_seconds,
    run,
    start,
    until_round,
)
from flwr.common import GetPropertiesIns
from omegaconf import OmegaConf
from ray.cluster_utils import Cluster
from ray.exceptions import OutOfMemoryError, RayActorError

from gwpf_baseline import simulation
from gwpf_baseline.config import checked, compose_config
from gwpf_baseline.records.history import read_history
from gwpf_baseline.simulation import Pool, RayNode, call_back
from gwpf_baseline.utils import RunError

# A run that has not ended by the time that somebody has seen what becomes of it.
LONG = ["num_rounds=1000", "local_steps=50"]


@pytest.fixture(name="reference", scope="module")
def _reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the small experiment without Ray."""
    folder = tmp_path_factory.mktemp("reference")
    run(*SMALL, "backend=local", f"hydra.run.dir={folder}")
    return folder


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    """Return the processes of a run in which clients are played."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,pgid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = []
    for line in listed:
        pid, group, args = line.split(None, 2)
        if int(group) == process.pid and args.startswith("ray::Worker"):
            found.append(int(pid))
    return found


def failures_of(folder: Path) -> list[int]:
    """Return how many clients of each round failed."""
    return [record.failures for record in read_history(folder)]


def recovered(process: "subprocess.Popen[str]", folder: Path) -> tuple[list[int], str]:
    """Let a run go on until it has done well again, and end it.

    Returns how many clients of each round failed, and what it printed.
    """
    limit = time.monotonic() + 200
    while True:
        failures = failures_of(folder)
        if any(failures) and not any(failures[-4:]):
            break
        assert time.monotonic() < limit and process.poll() is None, failures
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    return failures, output


class Asking:
    """A pool of two workers, both at a message, and messages that ask for one."""

    def __init__(self) -> None:
        self.pool = Pool(1, 0)
        self.pool.workers = ["a", "b"]
        self.pool._load = {"a": 0, "b": 0}
        for _ in range(2):
            self.pool.take(None, hurries=False)
        self.threads = ThreadPoolExecutor(4)
        self.asked: list[Future[Any]] = []

    def ask(self, worker: str, count: int, hurries: bool = False) -> list[str]:
        """Ask for a worker; return what was given to whom has asked so far."""
        take = self.pool.take
        self.asked += [self.threads.submit(take, worker, hurries) for _ in range(count)]
        return self.given()

    def answered(self, worker: str) -> list[str]:
        """Let a worker answer; return as above."""
        self.pool.answered(worker, None)
        return self.given()

    def given(self) -> list[str]:
        """Return the workers that were given away after a while."""
        return sorted(asked.result() for asked in wait(self.asked, timeout=0.2).done)

    def end(self) -> None:
        """Send away who still waits."""
        self.pool.workers = []
        self.pool.close()
        self.threads.shutdown()


@pytest.fixture(name="asking")
def _asking() -> Iterator[Asking]:
    """Return the pool, and send away who still waits at the end."""
    asking = Asking()
    yield asking
    asking.end()


def test_a_worker_gets_its_next_message_while_enough_are_left_for_the_others(
    asking: Asking,
) -> None:
    """Two of four wait at the workers, and the last ones for whoever is first."""
    assert asking.ask("a", 1) == []  # The other worker has nothing else to do.
    assert asking.ask("b", 3) == ["a", "b"]
    assert asking.answered("b") == ["a", "b", "b"]
    assert asking.answered("a") == ["a", "b", "b"]  # It has one message more.
    assert asking.answered("a") == ["a", "a", "b", "b"]


def test_who_is_not_waited_for_for_ever_does_not_wait_behind_another_client(
    asking: Asking,
) -> None:
    """The limit is for its own answer."""
    assert asking.ask("a", 3, hurries=True) == []
    assert asking.answered("b") == ["b"]
    assert asking.answered("a") == ["a", "b"]
    assert asking.answered("a") == ["a", "a", "b"]


def test_a_worker_that_was_ended_before_it_had_begun_gets_no_message(
    asking: Asking,
) -> None:
    """Whether it just had, or has failed, as it was killed."""
    for error in (None, RuntimeError("killed")):
        asking.pool._has_begun("ended", error)
    assert asking.pool.workers == ["a", "b"]
    assert asking.ask("ended", 1) == []


def test_what_fails_as_ray_is_stopped_is_nobodys_concern() -> None:
    """To end who failed, or to replace it, would start another Ray."""
    late: Future[None] = Future()
    told: list[BaseException | None] = []
    call_back(SimpleNamespace(future=lambda: late), told.append)
    assert not ray.is_initialized()
    late.set_exception(RuntimeError("its owner has died"))
    time.sleep(0.2)
    assert not told


def test_who_waits_as_the_workers_end_is_told(asking: Asking) -> None:
    """A free one, too, is given to nobody any more."""
    assert asking.ask("a", 1, hurries=True) == []
    asking.pool.workers = []
    asking.pool.close()
    with pytest.raises(RunError, match="no worker of Ray is left"):
        asking.asked.pop().result(timeout=10)
    with pytest.raises(RunError, match="no worker of Ray is left"):
        asking.pool.take("b", hurries=False)


@pytest.fixture(name="pool")
def _pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pool]:
    """Begin a run on two workers of a Ray in this process."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level=logging.ERROR)
    pool = Pool(1, 0)
    cfg = checked(compose_config(SMALL))
    try:
        pool.begin(json.dumps(OmegaConf.to_container(cfg)), str(tmp_path))
        yield pool
    finally:
        pool.close()
        ray.shutdown()


def test_who_waits_for_another_jobs_processors_is_told(
    monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], str], pool: Pool
) -> None:
    """And has its turn once they are free."""
    monkeypatch.setattr(simulation, "_PATIENCE", 0.5)
    for _ in range(2):  # once both have begun
        pool.take(None, hurries=False)
    second = Pool(2, 0)
    second.begin(*pool._begun)
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(second.take, None, hurries=False)
        while "no worker of Ray has begun in 0.5 s" not in warnings():
            assert not wait([taken], timeout=0.1).done
        pool.close()
        assert taken.result(timeout=120) in second.workers
    second.close()


def ask(node: RayNode) -> None:
    """Have a client do something, whichever worker it takes."""
    answer = node.get_properties(GetPropertiesIns({"any": "thing"}), None, None)
    assert answer.properties == {"partition-id": node.partition}


def test_a_worker_that_died_is_noticed_by_who_was_to_get_a_client_from_it(
    pool: Pool,
) -> None:
    """Else each of its clients would be asked for, and be lost, one by one."""
    busy, other = pool.take(None, hurries=False), pool.take(None, hurries=False)
    nodes = [RayNode(partition, pool) for partition in range(2)]
    pool.answered(busy, None)
    for node in nodes:
        ask(node)
        assert node.held_by == busy
    # It is at a message that will not be answered while the other one is free.
    assert pool.take(busy, hurries=False) == busy
    pool.answered(other, None)
    ray.kill(busy)
    with pytest.raises(RayActorError):
        while True:  # it may give away a few clients more before it dies
            ray.get(busy.give.remote(9))
    with pytest.raises(RayActorError):
        ask(nodes[0])
    assert busy not in pool.workers and other in pool.workers
    for node in nodes:
        ask(node)


def test_a_worker_that_ran_out_of_memory_is_replaced(pool: Pool) -> None:
    """Ray names none in what it raises then."""
    worker = pool.take(None, hurries=False)
    pool.answered(worker, OutOfMemoryError("it was ended"))
    assert worker not in pool.workers and len(pool.workers) == 2
    for partition in range(3):
        ask(RayNode(partition, pool))


def test_who_could_not_be_sent_its_message_keeps_no_worker_busy(pool: Pool) -> None:
    """As where there is no room for it."""
    node = RayNode(0, pool)
    for _ in range(3):
        with pytest.raises(TypeError):
            node._ask("get_properties", threading.Lock(), None)
    ask(node)


def test_workers_that_cannot_take_part_are_dropped(pool: Pool, tmp_path: Path) -> None:
    """Those of the last run, and new ones; the next run has others."""
    begun = pool._begun
    cfg = checked(compose_config([*SMALL, "dataset=mnist", f"dataset.path={tmp_path}"]))
    for _ in range(2):
        pool.begin(json.dumps(OmegaConf.to_container(cfg)), str(tmp_path))
        deadline = time.monotonic() + 120
        while pool.workers and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(RunError, match="no worker of Ray is left"):
            pool.take(None, hurries=False)
    pool.begin(*begun)
    assert pool.take(None, hurries=False) in pool.workers


def test_a_client_that_nobody_holds_begins_anew(pool: Pool) -> None:
    """As where it was asked for before it had come: its limit was over meanwhile."""
    first, second = pool.take(None, hurries=False), pool.take(None, hurries=False)
    node = RayNode(3, pool)
    node.held_by = first
    pool.answered(second, None)
    ask(node)
    assert node.held_by == second
    node.held_by = first
    pool.answered(first, None)
    assert pool.take(second, hurries=False) == second
    ask(node)
    assert node.held_by == first


def test_a_worker_that_dies_costs_a_round_of_what_it_held(tmp_path: Path) -> None:
    """Its clients fail once, say that they are lost, and are played by another one."""
    # Two at most: three clients leave others idle, whose death nobody would notice.
    workers = f"client_resources.num_cpus={((os.cpu_count() or 1) + 1) // 2}"
    process = start(*SMALL, *LONG, workers, f"hydra.run.dir={tmp_path}")
    until_round(process, tmp_path, 3)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    failures, output = recovered(process, tmp_path)
    assert "a worker of Ray has died" in output
    # Each client that was held there says once that it is lost.
    assert sum(failures) <= 10 and not any(failures[:3])


def test_a_clients_error_is_told_in_its_own_words(tmp_path: Path) -> None:
    """Not by the beginning of what Ray says of it, which is a place in its code."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(*SMALL, "num_rounds=2", "checkpoint_every=2", f"hydra.run.dir={first}")
    for file in first.glob("checkpoints/*/client-*"):
        file.write_bytes(b"damaged")
    output = run(f"resume={first}", "num_rounds=3", f"hydra.run.dir={second}")
    # Rich breaks its lines where it likes.
    assert "areadablecheckpoint" in "".join(output.split())
    assert failures_of(second)[2] == 3


def test_nobody_waits_for_answers_that_do_not_come(tmp_path: Path) -> None:
    """A limit of a millisecond: each round is an empty one, and the run says so."""
    limits = ["round_timeout=0.001", "max_empty_rounds=2", "local_steps=200"]
    process = start(*SMALL, *limits, f"hydra.run.dir={tmp_path}")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: ")
    assert failures_of(tmp_path) == [3, 3]


def test_runs_of_a_sweep_share_workers_and_nothing_else(
    reference: Path, tmp_path: Path
) -> None:
    """The last of them comes to the history that it has alone."""
    alone = [key for key in SMALL if not key.startswith("seed=")]
    workers = f"client_resources.num_cpus=1,{os.cpu_count() or 1}"
    run("-m", *alone, "seed=8,7", workers, f"hydra.sweep.dir={tmp_path}")
    for folder in (tmp_path / "2", tmp_path / "3"):
        assert rows_without_seconds(folder) == rows_without_seconds(reference)
        assert model_bytes(folder) == model_bytes(reference)
    assert model_bytes(tmp_path / "0") != model_bytes(reference)


@pytest.fixture(name="cluster")
def _cluster() -> Iterator[Cluster]:
    """Start a Ray cluster of two machines, both here, with a worker each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


def test_a_cluster_gives_the_same_history_and_outlives_a_machine(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    """With two machines to the bit; one of them may be switched off meanwhile."""
    other = cluster.add_node(num_cpus=1)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    there = f"ray.address='{cluster.address}'"
    run(*SMALL, there, f"hydra.run.dir={whole}")
    assert rows_without_seconds(whole) == rows_without_seconds(reference)
    assert model_bytes(whole) == model_bytes(reference)

    process = start(*SMALL, there, *LONG, f"hydra.run.dir={halved}")
    until_round(process, halved, 3)
    cluster.remove_node(other, allow_graceful=False)
    failures, _ = recovered(process, halved)
    assert sum(failures) <= 10 and not any(failures[:3])
