"""A federation on Ray: workers that play clients, and hold what these keep.

Server, strategy and proxies are Flower's. Its own simulation runtime, which ``flwr
run`` uses, stands between them elsewhere: it looks for messages ten times a second
(flwrlabs/flower#3369), takes each client's state through the server's process twice a
round, and goes on asking a worker that has died. Histories are the same to the bit.
"""

import atexit
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Status,
)
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import (
    GetTimeoutError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from gwpf_baseline.client_app import Worker
from gwpf_baseline.local import SimulatedNode, among
from gwpf_baseline.server_app import Play
from gwpf_baseline.utils import ConfigError, RunError, one_line

log = logging.getLogger(__name__)

# What Ray raises where a worker has died, or was ended for want of memory.
_DEATHS = (RayActorError, OutOfMemoryError)
# Threads for each worker that hold a message for it, or wait with one.
_DEPTH = 4
# Seconds after which somebody is told that no worker has begun.
_PATIENCE = 60.0
# Bytes up to which Ray sends a message as it is; beyond, by its object store, which
# takes three times as long. By default they are 100 kB, less than a LeNet-5.
_MOST_INLINE = 10_000_000


def _name_of(worker: Any) -> str:
    """Return the name by which Ray's errors call an actor."""
    # pylint: disable-next=protected-access  # it has no other
    name: str = worker._actor_id.hex()
    return name


def call_back(answer: Any, call: Callable[[BaseException | None], None]) -> None:
    """Call once an answer of Ray is there, or has failed, with what went wrong.

    Not in the thread of Ray's that notices: there, it would wait for itself for ever if
    it were asked to end a worker. Nor once Ray has been stopped, which fails whatever
    is not there yet: to ask it for anything would start another one.
    """

    def aside(done: "Future[Any]") -> None:
        if ray.is_initialized():
            error = done.exception()
            threading.Thread(target=call, args=(error,), daemon=True).start()

    answer.future().add_done_callback(aside)


class _Turn(NamedTuple):
    """A message that waits for a worker: who holds its client, and whether it hurries.

    One that does not may wait at a worker, behind the message that this is answering.
    """

    held_by: Any
    hurries: bool
    given: "Future[Any]"


class Pool:
    """The workers, of which those that a client is known to are preferred for it.

    Parameters
    ----------
    num_cpus : int
        Of one worker.
    num_gpus : float
        Of one worker; less than 1 shares one.
    """

    def __init__(self, num_cpus: int, num_gpus: float) -> None:
        self.resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        options: dict[str, Any] = {"concurrency_groups": {"moves": 1}, **self.resources}
        self._actor: Any = ray.remote(**options)(Worker)
        self._lock = threading.Lock()
        # The messages that each worker has, of those that are ready.
        self._load: dict[Any, int] = {}
        self._waiting: list[_Turn] = []
        self._begun: tuple[str, str] = ("", "")
        self.workers: list[Any] = []

    def begin(self, text: str, folder: str) -> None:
        """Begin a run, with as many workers as there is room for; see `Worker.begin`.

        Raises
        ------
        ConfigError
            There is no room for a single one.
        """
        with self._lock:
            self._begun = (text, folder)
            for worker in self.workers:
                self._tell(worker)
            self._fill()
            if not self.workers:
                given = ", ".join(f"{key}={n}" for key, n in self.resources.items())
                allowed = "what a machine that Ray runs on has"
                raise ConfigError("client_resources", given, allowed)
        watch = threading.Timer(_PATIENCE, self._say_if_none_has_begun)
        watch.daemon = True
        watch.start()

    def close(self) -> None:
        """End the workers, and make room for others."""
        with self._lock:
            ended, self.workers = self.workers, []
            self._load.clear()
            # Whoever still waits for one of them is told.
            self._pass_on()
        for worker in ended:
            ray.kill(worker)

    def take(self, held_by: Any, hurries: bool) -> Any:
        """Wait for a worker, preferably a certain one.

        Parameters
        ----------
        held_by : object
            The worker that holds the client, or None.
        hurries : bool
            Whether only one will do that has nothing else to answer before.

        Returns
        -------
        object
            The worker, until :meth:`answered`.

        Raises
        ------
        RunError
            There is none left.
        """
        turn = _Turn(held_by, hurries, Future())
        with self._lock:
            self._waiting.append(turn)
            self._pass_on()
        return turn.given.result()

    def answered(self, worker: Any, error: BaseException | None) -> None:
        """Take a worker back, and do without whichever has died."""
        with self._lock:
            try:
                if isinstance(error, _DEATHS):
                    # It may as well be another one, that was to give a client away.
                    # One that ran out of memory is not named.
                    name = getattr(error, "actor_id", None) or _name_of(worker)
                    for dead in [w for w in self.workers if _name_of(w) == name]:
                        self._drop(dead, "has died, and with it what it held")
                        self._fill()
            finally:
                # Unless it has died, or was ended while it was busy.
                if worker in self.workers:
                    self._load[worker] -= 1
                self._pass_on()

    def _drop(self, worker: Any, why: str) -> None:
        log.warning("a worker of Ray %s", one_line(why))
        self.workers.remove(worker)
        self._load.pop(worker, None)
        # Another one is to have its place, even if it was only out of reach.
        with suppress(Exception):  # it is gone already, or Ray is
            ray.kill(worker)

    def _pass_on(self) -> None:
        """Give workers to messages that wait, as far as they go."""
        while match := self._match():
            turn, worker = match
            self._waiting.remove(turn)
            self._load[worker] += 1
            turn.given.set_result(worker)
        while self._waiting and not self.workers:
            error = RunError("no worker of Ray is left")
            self._waiting.pop().given.set_exception(error)

    def _match(self) -> tuple[_Turn, Any] | None:
        """Choose the next message, and who gets it: who holds its client, or anybody.

        While enough are left for the others, a worker gets its next one before it has
        answered the last: on their ways, it would do nothing for an eighth of the time
        that a small client takes.
        """
        idle = [worker for worker, load in self._load.items() if not load]
        for turn in self._waiting:
            if turn.held_by in idle:
                return turn, turn.held_by
        if idle and self._waiting:
            return self._waiting[0], idle[0]
        if len(self._waiting) >= len(self.workers):
            for turn in self._waiting:
                if self._load.get(turn.held_by) == 1 and not turn.hurries:
                    return turn, turn.held_by
        return None

    def _fill(self) -> None:
        """Start as many workers as there is room for."""
        for _ in range(self._room() - len(self.workers)):
            worker = self._actor.remote()
            self.workers.append(worker)
            # Where its machine is gone as well, it waits for another: nobody asks it
            # anything before it is there.
            self._tell(worker)

    def _tell(self, worker: Any) -> None:
        begun = worker.begin.remote(*self._begun)
        call_back(begun, functools.partial(self._has_begun, worker))

    def _has_begun(self, worker: Any, error: BaseException | None) -> None:
        with self._lock:
            if worker not in self.workers:
                return  # It was ended before it had begun.
            if error is None:
                self._load.setdefault(worker, 0)
            # One that has died since the last run is replaced once it is asked.
            elif worker not in self._load or not isinstance(error, _DEATHS):
                # For example, because the data is not on its machine.
                self._drop(worker, f"cannot take part: {_cause(error)}")
            self._pass_on()

    def _say_if_none_has_begun(self) -> None:
        if self.workers and not self._load:
            log.warning(
                "no worker of Ray has begun in %g s: others may have what "
                "client_resources asks for; the run goes on once it is free",
                _PATIENCE,
            )

    def _room(self) -> int:
        room = 0
        for machine in ray.nodes():
            there = machine["Resources"]
            fits = there.get("CPU", 0) / self.resources["num_cpus"]
            if self.resources["num_gpus"]:
                fits = min(fits, there.get("GPU", 0) / self.resources["num_gpus"])
            # Ten tenths of a GPU are one, though as floats they are less.
            room += int(fits + 1e-4)
        return room


class RayNode(SimulatedNode):
    """A node whose client is played by whichever worker is free.

    Parameters
    ----------
    partition : int
        The partition that the node serves.
    pool : Pool
        The workers.
    """

    def __init__(self, partition: int, pool: Pool) -> None:
        super().__init__(partition)
        self.pool = pool
        self.held_by: Any = None

    def forget(self) -> None:
        """Lose all state, as a node does that is set up again."""
        super().forget()
        self.held_by = None

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Let the client answer a message."""
        result: FitRes = self._ask("fit", ins, timeout)
        return result

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Say who the client is; ask it only if it has to do something."""
        if ins.config:
            result: GetPropertiesRes = self._ask("get_properties", ins, timeout)
            return result
        return GetPropertiesRes(Status(Code.OK, ""), {"partition-id": self.partition})

    def _ask(self, question: str, ins: Any, timeout: float | None) -> Any:
        if self.held_by not in self.pool.workers:
            # It has not been played yet, or who held it has died.
            self.forget()
        # Whoever's time is short must not spend it behind another client.
        worker = self.pool.take(self.held_by, hurries=timeout is not None)
        limit = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if limit is None else max(0.0, limit - time.monotonic())

        try:
            self.check()
            moved = None if self.held_by else self.store
            if self.held_by not in (None, worker):
                moved = self.held_by.give.options(concurrency_group="moves").remote(
                    self.partition
                )
                # A message that waits for it would hold up what else is to be given
                # away.
                ray.wait([moved], timeout=left(), fetch_local=False)
            # Without room for the message, Ray raises here.
            answer = worker.answer.remote(self.partition, question, ins, moved)
            self.held_by = worker
            # Half of the processor's time that a future of it takes.
            result = ray.get(answer, timeout=left())
        except GetTimeoutError:
            # Whoever is not waited for any longer still keeps the worker busy.
            call_back(answer, functools.partial(self.pool.answered, worker))
            raise
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, RayError):
                # Not the client's own: so it is lost, and will say so.
                self.forget()
            self.pool.answered(worker, cause)
            raise cause from None
        self.pool.answered(worker, None)
        return result


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong on a worker; Ray's own words for it begin far away."""
    return error.cause if isinstance(error, RayTaskError) else error


# Workers outlive a run: those of a sweep import and load but once. At most one pool, as
# another one would wait for ever for what this one occupies.
_kept: list[Pool] = []


def on_ray(cfg: DictConfig, folder: Path) -> Play:
    """Return what plays the rounds of a configuration on Ray.

    Parameters
    ----------
    cfg : DictConfig
        A checked configuration.
    folder : pathlib.Path
        The run's folder, for the clients' parts of checkpoints.

    Returns
    -------
    callable
        For :func:`~gwpf_baseline.server_app.run_server`.

    Raises
    ------
    RunError
        Ray could not start.
    ConfigError
        No machine of it has what one client needs.
    """
    _start_ray(cfg)
    pool = _pool(cfg.client_resources.num_cpus, cfg.client_resources.num_gpus)
    pool.begin(json.dumps(OmegaConf.to_container(cfg)), str(folder))

    nodes = [RayNode(client, pool) for client in range(cfg.num_clients)]
    return among(nodes, _DEPTH * max(len(pool.workers), 1))


def _pool(num_cpus: int, num_gpus: float) -> Pool:
    """Return the pool of a run, the last run's if its workers are the same."""
    pool = Pool(num_cpus, num_gpus)
    if _kept and _kept[0].resources == pool.resources:
        return _kept[0]
    for other in _kept:
        other.close()
    _kept[:] = [pool]
    return pool


def _start_ray(cfg: DictConfig) -> None:
    """Start Ray, or join the cluster that is configured; once a process."""
    if ray.is_initialized():
        return
    # Those of a Ray that somebody has stopped meanwhile are gone with it.
    _kept.clear()
    # Ray would otherwise print a tip about what this does, at every start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers then take large pages of memory for large arrays, a quarter of the time of
    # copying one; elsewhere than with glibc 2.35 or later it means nothing.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    local = cfg.ray.address == "local"
    try:
        ray.init(
            # By default one of its own: another one on this machine may be stale.
            address=cfg.ray.address,
            include_dashboard=False if local else None,
            _system_config=(
                {"max_direct_call_object_size": _MOST_INLINE} if local else None
            ),
            logging_level=logging.INFO if cfg.verbose else logging.ERROR,
            log_to_driver=cfg.verbose,
        )
    # Whatever it is: where a process of its own dies, Ray raises a plain Exception.
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        mend = "`ray start` on each machine, see README.md"
        if local:
            mend = "set RAY_TMPDIR to a short path to a writable folder with room"
        raise RunError(f"Ray could not start: {reason}; {mend}") from error
    atexit.register(stop_ray)


def stop_ray() -> None:
    """End the workers and Ray; a process does so by itself at its end.

    By itself, Ray would also wait half a second at the end for what is to be printed.
    """
    # Who has stopped Ray already has ended them; to end one would start Ray again.
    if ray.is_initialized():
        # First: for the sake of one that fails another one would be started.
        for pool in _kept:
            pool.close()
        ray.shutdown()
