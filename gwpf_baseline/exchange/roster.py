"""Who the clients are, and which of them are there."""

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from flwr.common import GetPropertiesIns, Scalar
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy

from gwpf_baseline.utils import ConfigError, derive_seed

log = logging.getLogger(__name__)

_MAX_THREADS = 64


class Roster:
    """The clients of a run, by the partition of the data that each serves.

    Flower's node ids are random; partition ids make a run repeatable.

    Parameters
    ----------
    num_clients : int
        Clients to wait for before the first round.
    fraction : float
        Share of the available clients that take part in a round, at least one.
    seed : int
        Seed of the sampling.
    connect_timeout : float
        Seconds to wait for `num_clients` nodes.
    answer_timeout : float or None
        Seconds to wait for a client's answer, None for no limit.
    """

    def __init__(
        self,
        num_clients: int,
        fraction: float,
        seed: int,
        connect_timeout: float,
        answer_timeout: float | None,
    ) -> None:
        self.num_clients = num_clients
        self.fraction = fraction
        self.seed = seed
        self.connect_timeout = connect_timeout
        self.answer_timeout = answer_timeout
        self._proxies: dict[int, ClientProxy] = {}
        self._clients: dict[str, int] = {}

    def sample(self, server_round: int, client_manager: ClientManager) -> list[int]:
        """Draw the clients of a round.

        Parameters
        ----------
        server_round : int
            The round; the same one draws the same clients of the same available ones.
        client_manager : ClientManager
            Flower's connected nodes.

        Returns
        -------
        list of int
            Partition ids in ascending order; empty if nobody is there.

        Raises
        ------
        ConfigError
            Before the first round, fewer than `num_clients` nodes connect in time.
        """
        self._call(client_manager)
        available = sorted(self._proxies)
        if not available:
            return []
        count = max(1, round(self.fraction * len(available)))
        rng = np.random.default_rng(derive_seed(self.seed, "sample", server_round))
        chosen: list[int] = rng.choice(available, count, replace=False).tolist()
        return sorted(chosen)

    def proxy(self, client: int) -> ClientProxy:
        """Return the node that serves a partition."""
        return self._proxies[client]

    def client(self, proxy: ClientProxy) -> int:
        """Return the partition that a node serves."""
        return self._clients[proxy.cid]

    def ask_to_save(self, server_round: int) -> None:
        """Have every client write its state for a round's checkpoint."""
        self._ask(self._proxies.values(), {"checkpoint": server_round})

    def _call(self, client_manager: ClientManager) -> None:
        """Note who is connected, asking new nodes which partition they serve."""
        complete = bool(self._proxies) or client_manager.wait_for(
            self.num_clients, int(self.connect_timeout)
        )
        # Later, if all have gone, the run goes on with whoever comes back.
        if not complete and not self._clients:
            raise ConfigError(
                "num_clients",
                self.num_clients,
                f"at most the number of connected nodes, "
                f"{client_manager.num_available()}; for a simulation by flwr run: "
                f'--federation-config "num-supernodes={self.num_clients}"',
            )
        connected = client_manager.all()
        new = [proxy for cid, proxy in connected.items() if cid not in self._clients]
        self._clients.update(self._ask(new, {}))
        self._proxies = {}
        for cid in sorted(connected):
            client = self._clients.get(cid)
            if client is None:
                continue
            if client in self._proxies:
                log.warning("node %s also claims partition %d: left out", cid, client)
                continue
            self._proxies[client] = connected[cid]

    def _ask(
        self, proxies: Iterable[ClientProxy], config: dict[str, Scalar]
    ) -> dict[str, int]:
        """Return the partition ids of those nodes that answer."""

        def ask(proxy: ClientProxy) -> tuple[str, int] | None:
            try:
                answer = proxy.get_properties(
                    GetPropertiesIns(config), self.answer_timeout, group_id=None
                )
                return proxy.cid, int(answer.properties["partition-id"])
            # Whatever goes wrong on a node must not end the others' round.
            except Exception as error:  # pylint: disable=broad-exception-caught
                log.warning("node %s gave no answer: %s", proxy.cid, error)
                return None

        with ThreadPoolExecutor(_MAX_THREADS) as pool:
            return dict(filter(None, pool.map(ask, proxies)))
