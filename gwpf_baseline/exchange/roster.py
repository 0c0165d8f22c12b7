"""Who the clients are, which of them are there, and which are given a rest."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from flwr.common import GetPropertiesIns, Scalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from gwpf_baseline.utils import (
    ConfigError,
    derive_seed,
    is_number,
    is_whole,
    one_line,
)

log = logging.getLogger(__name__)

# Nodes that are asked at a time who they are, and clients that save. Apart, so that
# those who never say who they are keep nobody waiting.
_MOST_ASKED = 512
_MOST_SAVING = 64
# Seconds that a round waits for new nodes to say who they are; others join a later one.
_PATIENCE = 2.0
_POLL = 0.2
# Seconds that a checkpoint waits for a client where answers have no limit.
_LONGEST_SAVE = 600.0
# A rest ends within 2**6 rounds, and within as many a node is asked again.
_MOST_DOUBLINGS = 6


@dataclass
class _Node:
    """A connected node.

    Parameters
    ----------
    proxy : ClientProxy
        Flower's handle.
    partition : int or None, default None
        What it says that it serves, once it has said so.
    question : Future, optional
        Its answer, while it is waited for.
    attempts : int, default 0
        How often it gave no sound answer.
    ask_in, ask_at : int and float, default 0
        The round from which it is asked again; before the first one, the time.
    silences : int, default 0
        How often it gave no answer while it held its partition.
    """

    proxy: ClientProxy
    partition: int | None = None
    question: Future[int | None] | None = None
    attempts: int = 0
    ask_in: int = 0
    ask_at: float = 0.0
    silences: int = 0


@dataclass
class Standing:
    """How well a client has answered.

    Parameters
    ----------
    strikes : int, default 0
        Grows by what it failed in, falls by one with each sound answer.
    rests_until : int, default 0
        The first round for which it may be drawn again.
    """

    strikes: int = 0
    rests_until: int = 0


def check_sampling(num_clients: object, fraction_fit: object) -> None:
    """Check how many clients there are, and what share takes part, as configured.

    Parameters
    ----------
    num_clients : object
        A whole number of at least 1.
    fraction_fit : object
        A number in ``(0, 1]``.

    Raises
    ------
    ConfigError
        It is something else.
    """
    if not is_whole(num_clients, 1):
        raise ConfigError("num_clients", num_clients, "a whole number >= 1")
    if not is_number(fraction_fit) or not 0 < fraction_fit <= 1:
        raise ConfigError("fraction_fit", fraction_fit, "in (0, 1]")


class Roster:
    """The clients of a run, by the partition of the data that each serves.

    Flower's node ids are random; partition ids make a run repeatable. A node keeps its
    partition while it answers; another one that claims the same takes over when it
    fails or leaves. Clients that go on failing are asked ever less often.

    Parameters
    ----------
    num_clients : int
        Clients to wait for before the first round; their partitions are 0 to
        ``num_clients - 1``.
    fraction : float
        Share of the available clients that take part in a round, at least one.
    seed : int
        Seed of the sampling.
    connect_timeout : float
        Seconds to wait for `num_clients` nodes, and for a node to say who it is.
    answer_timeout : float or None
        Seconds to wait for a client's answer, None for no limit.

    Raises
    ------
    ConfigError
        As of :func:`check_sampling`.
    """

    def __init__(
        self,
        num_clients: int,
        fraction: float,
        seed: int,
        connect_timeout: float,
        answer_timeout: float | None,
    ) -> None:
        check_sampling(num_clients, fraction)
        self.num_clients = num_clients
        self.fraction = fraction
        self.seed = seed
        self.connect_timeout = connect_timeout
        self.answer_timeout = answer_timeout
        self._nodes: dict[str, _Node] = {}
        self._holders: dict[int, str] = {}
        self._failing: set[int] = set()
        self._standings: dict[int, Standing] = {}
        self._asking = ThreadPoolExecutor(_MOST_ASKED)
        self._saving = ThreadPoolExecutor(_MOST_SAVING)
        self._complete = False

    def sample(self, server_round: int, client_manager: ClientManager) -> list[int]:
        """Draw the clients of a round.

        Parameters
        ----------
        server_round : int
            The round; the same one draws the same clients of the same available ones.
        client_manager : ClientManager
            Flower's manager of connected nodes.

        Returns
        -------
        list of int
            Partition ids, ascending; empty if nobody is there.

        Raises
        ------
        ConfigError
            Before the first round, fewer than `num_clients` clients connect in time.
        """
        self._call(server_round, client_manager)
        here = sorted(self._holders)
        rested = [
            client for client in here if self._rests_until(client) <= server_round
        ]
        # Where all have failed, a rest would help nobody.
        available = rested or here
        if not available:
            return []
        count = max(1, round(self.fraction * len(available)))
        rng = np.random.default_rng(derive_seed(self.seed, "sample", server_round))
        chosen: list[int] = rng.choice(available, count, replace=False).tolist()
        return sorted(chosen)

    def proxy(self, client: int) -> ClientProxy:
        """Return the node that serves a partition."""
        return self._nodes[self._holders[client]].proxy

    def client(self, proxy: ClientProxy) -> int:
        """Return the partition that a node which was asked serves."""
        partition = self._nodes[proxy.cid].partition
        assert partition is not None
        return partition

    def answered(self, client: int) -> None:
        """Note that a client gave a sound answer."""
        standing = self._standings.get(client)
        if standing is not None:
            standing.strikes = max(0, standing.strikes - 1)

    def failed(
        self, client: int, server_round: int, strikes: int = 1, silent: bool = False
    ) -> None:
        """Note that a client's answer was of no use.

        Parameters
        ----------
        client : int
            Its partition id.
        server_round : int
            The round under way.
        strikes : int, default 1
            How much that counts. Up to two strikes it is asked again in the next round;
            beyond, it rests for 1, 3, 7, ... rounds.
        silent : bool, default False
            Whether there was no answer at all, so that another node that claims the
            partition is to take over.
        """
        standing = self._standings.setdefault(client, Standing())
        standing.strikes += strikes
        rest = 2 ** min(max(0, standing.strikes - 2), _MOST_DOUBLINGS) - 1
        standing.rests_until = server_round + 1 + rest
        if silent:
            self._failing.add(client)
            self._nodes[self._holders[client]].silences += 1

    def ask_to_save(self, server_round: int, checkpoint: str, committed: str) -> None:
        """Have every client write its state for a checkpoint.

        Parameters
        ----------
        server_round : int
            The round under way.
        checkpoint : str
            The checkpoint's name.
        committed : str
            That of the one before, which counts until this one is whole.
        """
        limit = self.answer_timeout or _LONGEST_SAVE
        config: dict[str, Scalar] = {
            "checkpoint": checkpoint,
            "committed": committed,
        }
        asked = {
            client: self._saving.submit(
                self._partition_of, self.proxy(client), config, limit
            )
            for client in sorted(self._holders)
        }
        for client in range(self.num_clients):
            answer = asked.get(client)
            # Each has its time from when its turn has come.
            if answer is None or answer.result() is None:
                log.warning(
                    "client %d did not write its part of the checkpoint", client
                )
                # Who is never there for it would hold up every one.
                if answer is not None:
                    self.failed(client, server_round)

    def state(self) -> dict[str, list[int]]:
        """Return how well the clients have answered, as JSON holds it."""
        return {
            str(client): [standing.strikes, standing.rests_until]
            for client, standing in self._standings.items()
        }

    def load_state(self, state: dict[str, list[int]]) -> None:
        """Take back what :meth:`state` returned.

        Raises
        ------
        ValueError
            Not two whole numbers from 0 on for clients that there are.
        """
        for client, values in state.items():
            if len(values) != 2 or not all(is_whole(value, 0) for value in values):
                raise ValueError(f"a standing of {values}")
            self._standings[self.check(int(client))] = Standing(*values)

    def check(self, client: object) -> int:
        """Return a client's partition id, if it is one.

        Raises
        ------
        ValueError
            It is not a whole number from 0 to ``num_clients - 1``.
        """
        if not is_whole(client, 0) or client >= self.num_clients:
            raise ValueError(f"{client!r} is no partition")
        return client

    def _rests_until(self, client: int) -> int:
        return self._standings.get(client, Standing()).rests_until

    # ---- who is there -------------------------------------------------------------

    def _call(self, server_round: int, client_manager: ClientManager) -> None:
        """Note who is connected and who serves what."""
        deadline = time.monotonic() + self.connect_timeout
        # Before the first round for all; later, if all have gone, for one to come back.
        self._look(server_round, client_manager)
        if not self._enough():
            log.warning(
                "waiting for clients: %d of %d partitions are served "
                "(connect_timeout=%g)",
                len(self._holders),
                self.num_clients,
                self.connect_timeout,
            )
        while not self._enough() and time.monotonic() < deadline:
            time.sleep(_POLL)
            self._look(server_round, client_manager)
        if not self._complete and not self._enough():
            silent = [cid for cid, node in self._nodes.items() if node.question]
            who = f", without an answer yet: {', '.join(silent)}" if silent else ""
            raise ConfigError(
                "num_clients",
                self.num_clients,
                f"at most the number of partitions that connected nodes serve, "
                f"{len(self._holders)} (nodes: {client_manager.num_available()}{who}); "
                "for a simulation by flwr run: "
                f'--federation-config "num-supernodes={self.num_clients}"',
            )
        self._complete = True

    def _enough(self) -> bool:
        wanted = 1 if self._complete else self.num_clients
        return len(self._holders) >= wanted

    def _look(self, server_round: int, client_manager: ClientManager) -> None:
        """Ask new nodes who they are, and settle who holds which partition."""
        self._nodes = {
            cid: self._nodes.get(cid, _Node(proxy))
            # A copy: nodes come and go in Flower's own thread.
            for cid, proxy in client_manager.all().copy().items()
        }
        asked = []
        for node in self._nodes.values():
            unknown = node.partition is None and node.question is None
            # No round passes while the first one waits for it.
            again = not self._complete and node.ask_at <= time.monotonic()
            if unknown and (node.ask_in <= server_round or again):
                limit = max(1, self.connect_timeout)
                node.question = self._asking.submit(
                    self._partition_of, node.proxy, {}, limit
                )
                asked.append(node.question)
        wait(asked, _PATIENCE)
        new = []
        for cid, node in self._nodes.items():
            if node.question is not None and node.question.done():
                node.partition, node.question = node.question.result(), None
                new.append(cid)
                if node.partition is None:
                    later = 2 ** min(node.attempts, _MOST_DOUBLINGS)
                    node.ask_in = server_round + later
                    node.ask_at = time.monotonic() + later
                    node.attempts += 1
        self._settle()
        for cid in new:
            partition = self._nodes[cid].partition
            if partition is not None and self._holders[partition] != cid:
                log.warning(
                    "node %s also claims partition %d, which node %s keeps",
                    cid,
                    partition,
                    self._holders[partition],
                )

    def _settle(self) -> None:
        """Let every partition be held by one node."""
        claims: dict[int, list[str]] = {}
        for cid in sorted(self._nodes):
            partition = self._nodes[cid].partition
            if partition is not None:
                claims.setdefault(partition, []).append(cid)
        before, self._holders = self._holders, {}
        for client, claimants in claims.items():
            holder = before.get(client)
            if holder not in claimants or client in self._failing:
                last = holder
                # Whoever waits comes before the one that failed.
                line = [cid for cid in claimants if cid != last] or claimants
                holder = min(line, key=lambda cid: self._nodes[cid].silences)
                if last not in (None, holder):
                    log.warning("node %s takes over partition %d", holder, client)
            self._holders[client] = holder
        self._failing.clear()

    def _partition_of(
        self, proxy: ClientProxy, config: dict[str, Scalar], limit: float
    ) -> int | None:
        """Ask a node which partition it serves; None if it gives no sound answer."""
        try:
            question = GetPropertiesIns(config)
            answer = proxy.get_properties(question, limit, group_id=None)
            partition = answer.properties.get("partition-id")
        # Whatever goes wrong on a node must not end the others' round.
        except Exception as error:  # pylint: disable=broad-exception-caught
            log.warning("node %s gave no answer: %s", proxy.cid, one_line(error))
            return None
        try:
            return self.check(partition)
        except ValueError:
            log.warning(
                "node %s claims partition %s, there are 0 to %d: left out",
                proxy.cid,
                one_line(repr(partition)),
                self.num_clients - 1,
            )
            return None
