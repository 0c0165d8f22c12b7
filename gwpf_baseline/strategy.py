"""What every method's Flower Strategy shares: the story of a round and its exchanges.

Who takes part, what each client is written, what it cost and what happens around a
round stand in rooms of their own. A method adds what it decides: which coordinates are
exchanged, and what becomes of the uploads. ``gwpf_baseline.methods`` shows a whole one.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import fit_clients
from flwr.server.strategy import Strategy
from torch import nn

from gwpf_baseline.exchange.coding import MOST, WireError
from gwpf_baseline.exchange.header import FORMAT_VERSION, Kind
from gwpf_baseline.exchange.messages import ClientLost, ClientRecord, size_of
from gwpf_baseline.exchange.network import Network
from gwpf_baseline.exchange.payload import Part, Sizes, as_tensor
from gwpf_baseline.exchange.roster import Roster
from gwpf_baseline.learning.flat_model import buffer_limits, to_ndarrays
from gwpf_baseline.learning.method_server import MethodServer, Upload
from gwpf_baseline.records.books import Books
from gwpf_baseline.records.checkpoint import (
    StateError,
    as_arrays,
    as_tensors,
    check_like,
    checkpoint_name,
)
from gwpf_baseline.records.history import RoundRecord, from_rows
from gwpf_baseline.utils import (
    ConfigError,
    FloatVector,
    RunError,
    is_whole,
    one_line,
)

log = logging.getLogger(__name__)

# What values raise that stand where others are expected.
_MISREAD = (
    KeyError,
    TypeError,
    ValueError,
    IndexError,
    AttributeError,
    ArithmeticError,
)

Results = Sequence[tuple[ClientProxy, FitRes]]
Failures = Sequence[tuple[ClientProxy, FitRes] | BaseException]


class _Answer(NamedTuple):
    """A sound answer: its weight, whether it is used, and how far it would lead."""

    result: FitRes
    weight: float
    used: bool
    length: float
    distance: float


class Callback:
    """What happens around a round; a user's own take their place beside ours.

    ``gwpf_baseline.callbacks`` has those of every run.
    """

    def measure(self, strategy: "SyncStrategy", number: int) -> dict[str, float]:
        """Measure the model at the end of a round, before its record is made.

        Parameters
        ----------
        strategy : SyncStrategy
            Holds the model.
        number : int
            The round.

        Returns
        -------
        dict of str to float
            What to put into the round's record, by its column; by default nothing.
        """
        del strategy, number
        return {}

    def after_round(self, strategy: "SyncStrategy", record: RoundRecord) -> bool:
        """See a round's record.

        Parameters
        ----------
        strategy : SyncStrategy
            What the round has made of it.
        record : RoundRecord
            The record.

        Returns
        -------
        bool
            Whether this round is to be the run's last; by default it is not.
        """
        del strategy, record
        return False


class _GlobalModel(Parameters):
    """The global model of now, serialised where somebody reads it.

    Flower's server keeps it and hands it on, but none of our hooks looks into it.
    """

    tensor_type = "numpy.ndarray"

    # pylint: disable-next=super-init-not-called  # its tensors are not there yet
    def __init__(self, strategy: "SyncStrategy") -> None:
        self._strategy = strategy

    @property
    def tensors(self) -> list[bytes]:  # type: ignore[override]
        """Return what the strategy's own parameters have."""
        tensors: list[bytes] = self._strategy.parameters().tensors
        return tensors


# pylint: disable-next=abstract-method  # which a method fills in
class SyncStrategy(MethodServer[Upload], Strategy):
    """A Flower Strategy that exchanges only what a method decides to.

    Parameters
    ----------
    model : torch.nn.Module
        The model with its initial weights, which every client can derive as well.
    num_clients : int
        Clients to wait for before the first round.
    fraction_fit : float, default 1.0
        Share of the available clients that take part in a round, at least one.
    network : Network, optional
        Gives each record its ``modelled_seconds``.
    callbacks : sequence of Callback, default none
        What happens around each round, in this order.
    connect_timeout : float, default 120.0
        Seconds to wait for `num_clients` nodes.
    round_timeout : float, optional
        Seconds to wait for a client in a follow-up exchange, and for its part of a
        checkpoint; default: no limit, and 600 for that part.
    max_empty_rounds : int, default 5
        After so many rounds in a row without a single sound answer the run ends.
    num_examples : sequence of int, optional
        How many examples each client has, where they are weighted by them: what a
        client says of itself could own the mean.
    **options : object
        Those of :class:`~gwpf_baseline.learning.method_server.MethodServer`: `config`,
        `seed`, `weighting`, `server_optimizer`, `quantization`, `norm_bound`.

    Attributes
    ----------
    roster : Roster
        Who the clients are.
    books : Books
        What each round cost.
    callbacks : list of Callback
        What happens around each round.
    finished : bool
        Whether a callback has ended the run; further rounds do nothing.
    at_once : int, optional
        How many messages of a follow-up exchange are on their way at a time; None: as
        many threads as Python gives. Of others the server knows.
    round : int
        The round under way, or the last one.
    committed : str
        The name of the last whole checkpoint, empty if there is none.

    Raises
    ------
    ConfigError
        An option that is not allowed.
    RunError
        From a round: too many in a row had no answer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_clients: int,
        fraction_fit: float = 1.0,
        network: Network | None = None,
        callbacks: Sequence[Callback] = (),
        connect_timeout: float = 120.0,
        round_timeout: float | None = None,
        max_empty_rounds: int = 5,
        num_examples: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.num_examples = num_examples or []
        if self.weighting == "examples" and len(self.num_examples) != num_clients:
            raise ConfigError(
                "weighting", "examples", "uniform where num_examples are not all given"
            )
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError("callbacks", callback, "of the class Callback")
        self.max_empty_rounds = max_empty_rounds
        self.roster = Roster(
            num_clients, fraction_fit, self.seed, connect_timeout, round_timeout
        )
        dense_bytes = 4 * (self.dimension + self.buffers.numel())
        self.books = Books(dense_bytes, self.dimension, network)
        self.callbacks = list(callbacks)
        self.finished = False
        self.at_once: int | None = None
        self.round = 0
        self.committed = ""
        self._empty_rounds = 0
        self._least, self._most = buffer_limits(model)
        # Counters go as far as there are iterations, and would hide what is measured.
        self._measured = np.isinf(self._most)
        self._buffer_sum = torch.zeros(0)

    @property
    def records(self) -> list[RoundRecord]:
        """Return the records of all rounds."""
        return self.books.records

    # ---- Flower's hooks -----------------------------------------------------------

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Return the initial model in the shapes of its state dict."""
        return self.parameters()

    def parameters(self) -> Parameters:
        """Return the global model in the shapes of its state dict."""
        arrays = to_ndarrays(self.model, self.weights, self.buffers)
        return ndarrays_to_parameters(arrays)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Sample the round's clients and write to each what it lacks."""
        if self.finished:
            return []
        self.answers = 0
        number = self.round = self.books.absolute(server_round)
        clients = self.roster.sample(number, client_manager)
        self.books.open_round(len(clients))
        if not clients:
            log.warning("round %d: no client is available", number)
            return []
        return self._open_exchange(clients, follow_up=False)

    def aggregate_fit(
        self, server_round: int, results: Results, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Use every sound upload, and ask again where the method wants to."""
        used = self._close_exchange(results, failures)
        self.books.tally.used = len(used)
        if used and self.wants_follow_up():
            instructions = self._open_exchange(used, follow_up=True)
            timeout = self.roster.answer_timeout
            answers = fit_clients(instructions, self.at_once, timeout, server_round)
            self._close_exchange(*answers)
        return _GlobalModel(self), {}

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Measure the global model and close the round's record.

        Raises
        ------
        RunError
            Too many rounds in a row had no sound answer.
        """
        if server_round == 0 or self.finished:
            return None
        number = self.books.absolute(server_round)
        metrics = self.metrics() if self.answers else {}
        for callback in self.callbacks:
            metrics |= callback.measure(self, number)
        record = self.books.close_round(number, metrics)
        for callback in self.callbacks:
            self.finished |= callback.after_round(self, record)
        self._empty_rounds = 0 if self.answers else self._empty_rounds + 1
        if self._empty_rounds >= self.max_empty_rounds:
            raise RunError(
                f"no client gave a sound answer in the last {self._empty_rounds} "
                "rounds (max_empty_rounds); the log says why"
            )
        if record.test_loss is None or record.test_accuracy is None:
            return None
        return record.test_loss, {"accuracy": record.test_accuracy}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Return nothing: the global model is measured on the server."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Return nothing: no client is asked to evaluate."""
        return None, {}

    # ---- the story of an exchange -------------------------------------------------

    def _open_exchange(
        self, clients: Sequence[int], follow_up: bool
    ) -> list[tuple[ClientProxy, FitIns]]:
        started = time.monotonic()
        for client in clients:
            self.clients.setdefault(client, ClientRecord(version=0))
        self.messages.open(follow_up)
        self.begin_exchange()
        self._reset_sums()
        self.messages.ask_for(self.request())
        instructions = []
        for client in clients:
            message = self.messages.write(client, self.sends_mask(client))
            self.books.sent(client, message.size, message.sizes)
            config: dict[str, Scalar] = {
                "round": self.round,
                "committed": self.committed,
            }
            ins = FitIns(message.parameters, config)
            instructions.append((self.roster.proxy(client), ins))
        self.books.all_sent(time.monotonic() - started)
        return instructions

    def _close_exchange(self, results: Results, failures: Failures) -> list[int]:
        started = time.monotonic()
        waited = self.books.waited()
        known = {self.roster.client(proxy): result for proxy, result in results}
        self._miss(self.books.waiting_for.difference(known), failures)
        sound: dict[int, _Answer] = {}
        # Floating-point sums depend on their order: not the order of arrival.
        for client in sorted(known):
            result = known[client]
            size, sizes = size_of(result.parameters), Counter[Part]()
            try:
                weight = self._weight(client, result.num_examples)
                content = self._read(client, result.parameters, sizes)
            # Whatever one client's answer holds must not end the others' round.
            except Exception as error:  # pylint: disable=broad-exception-caught
                self._leave_out(client, error)
                continue
            finally:
                self.books.received(size, sizes)
            lengths = self.update_bound.length, self.buffer_bound.length
            sound[client] = _Answer(result, weight, content is not None, *lengths)
            self._add(content, weight)
        if self._leave_out_the_longest(sound):
            self._reset_sums()
            for client, answer in sound.items():
                content = self._read(client, answer.result.parameters, Counter())
                self._add(content, answer.weight)
        for client, answer in sound.items():
            self.roster.answered(client)
            self.messages.confirm(client, answer.used)
            metrics, size = answer.result.metrics, size_of(answer.result.parameters)
            self.books.learned(metrics.get("train_loss"))
            self.books.worked(client, size, metrics.get("compute_seconds"), waited)
        if not self.follow_up:
            self.answers += len(sound)
        used = {client: answer for client, answer in sound.items() if answer.used}
        if used:
            total_weight = sum(answer.weight for answer in used.values())
            self.messages.close(self.finish_exchange(total_weight))
            if not self.follow_up:
                torch.div(self._buffer_sum, total_weight, out=self.buffers)
                # Counters leave room for what clients count from there on.
                most = torch.from_numpy(self._most / 2)
                torch.minimum(self.buffers, most, out=self.buffers)
        else:
            self.abandon_exchange()
        self.books.close_exchange(time.monotonic() - started)
        return list(used)

    def _reset_sums(self) -> None:
        self._buffer_sum = torch.zeros_like(self.buffers)
        self.reset_sums()

    def _add(self, content: tuple[Upload, FloatVector] | None, weight: float) -> None:
        if content is None:
            return
        upload, buffers = content
        self.add_upload(upload, weight)
        if not self.follow_up:
            self._buffer_sum.add_(as_tensor(buffers), alpha=weight)

    def _leave_out_the_longest(self, sound: dict[int, "_Answer"]) -> bool:
        """Take those out who would move the model further than they may."""
        used = [answer for answer in sound.values() if answer.used]
        # A follow-up's updates are of a few coordinates, and no measure of others.
        longest = self.update_bound.longest(
            [answer.length for answer in used], remember=not self.follow_up
        )
        furthest = self.buffer_bound.longest([answer.distance for answer in used])
        beyond = [
            client
            for client, answer in sound.items()
            if answer.length > longest or answer.distance > furthest
        ]
        for client in beyond:
            answer = sound.pop(client)
            # So that it learns of it, and does not send the same again.
            self.messages.confirm(client, used=False)
            self._leave_out(
                client,
                f"an update of norm {answer.length:.3g}, buffers {answer.distance:.3g} "
                f"away: at most {longest:.3g} and {furthest:.3g} (norm_bound)",
            )
        return bool(beyond)

    def _read(
        self, client: int, parameters: Parameters, sizes: Sizes
    ) -> tuple[Upload, FloatVector] | None:
        """Return a client's upload and buffers, None if it has skipped the exchange."""
        self.update_bound.length = self.buffer_bound.length = 0.0
        with_mask = self.sends_mask(client)
        reader = self.messages.open_answer(client, parameters, with_mask)
        if reader.header.kind is Kind.SKIPPED:
            return None
        upload = self.read_upload(reader)
        size = 0 if self.follow_up else self.buffers.numel()
        buffers = reader.vector(size, part=Part.BUFFERS)
        reader.finish()
        if size:
            if ((buffers < self._least) | (buffers > self._most)).any():
                raise WireError("a buffer beyond what it can be")
            measured = self._measured
            self.buffer_bound.measure(buffers[measured], self.buffers.numpy()[measured])
        sizes.update(reader.sizes)
        return upload, buffers

    def _weight(self, client: int, num_examples: object) -> float:
        if self.weighting == "uniform":
            return 1.0
        known = self.num_examples[client]
        if not is_whole(num_examples) or num_examples != known:
            raise WireError(f"it says that it has {num_examples} examples, not {known}")
        return float(known)

    def _miss(self, silent: set[int], failures: Failures) -> None:
        """Note those of whom there is no answer."""
        for client in silent:
            self.roster.failed(client, self.round, silent=True)
        for failure in failures:
            if isinstance(failure, tuple):
                proxy, result = failure
                who = str(self.roster.client(proxy))
                self._warn(who, result.status.message)
            else:
                # Flower does not say whose an error is, only that somebody is silent.
                self._warn(" or ".join(map(str, sorted(silent))), failure)

    def _leave_out(self, client: int, reason: object) -> None:
        # To be written the whole model is what costs the server most.
        strikes = 2 if isinstance(reason, ClientLost) else 1
        self.roster.failed(client, self.round, strikes)
        self._warn(str(client), reason)

    def _warn(self, who: str, reason: object) -> None:
        self.books.tally.failures += 1
        why = one_line(reason)
        log.warning("client %s left out of exchange %d: %s", who, self.exchange, why)

    # ---- state --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the server's whole state: tensors and values that JSON holds."""
        return {
            **{f"method.{k}": v for k, v in self.method_state().items()},
            "format": FORMAT_VERSION,
            "weights": self.weights,
            "buffers": self.buffers,
            "last_changed": torch.from_numpy(self.messages.last_changed),
            "exchange": self.exchange,
            **{
                f"optimizer.{name}": moment
                for name, moment in as_tensors(self.optimizer.state()).items()
            },
            "clients": {str(c): asdict(r) for c, r in self.clients.items()},
            "records": [astuple(record) for record in self.records],
            "standings": self.roster.state(),
            "norms": [self.update_bound.recent, self.buffer_bound.recent],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` returned.

        Parameters
        ----------
        state : dict of str to object
            The state; rounds go on after its last one.

        Raises
        ------
        StateError
            It is none of this run's; the strategy is then of no use.
        """
        if state.get("format") != FORMAT_VERSION:
            raise StateError("of another release, which codes messages in another way")
        check_like(state, self.state())
        try:
            self._load(state)
        # Whatever values it holds where JSON stands for something else.
        except _MISREAD as error:
            raise StateError(f"{type(error).__name__}: {error}") from error

    def _load(self, state: dict[str, Any]) -> None:
        self.weights.copy_(state["weights"])
        self.buffers.copy_(state["buffers"])
        self.messages.last_changed[:] = state["last_changed"].numpy()
        self.messages.exchange = state["exchange"]
        self.messages.records = {
            int(client): ClientRecord(**record)
            for client, record in state["clients"].items()
        }
        for client, held in self.clients.items():
            self.roster.check(client)
            held.check(self.exchange)
        if self.exchange >= MOST:
            raise ValueError(f"exchange {self.exchange}")
        if np.max(self.messages.last_changed, initial=0) > self.exchange:
            raise ValueError("last_changed is beyond the last exchange")
        self.load_method_state(_below("method.", state))
        self.optimizer.load_state(as_arrays(_below("optimizer.", state)))
        records = from_rows(state["records"])
        if [record.round for record in records] != list(range(1, len(records) + 1)):
            raise ValueError("the records are not of all rounds")
        self.books.restore(records)
        self.round = len(records)
        self.committed = checkpoint_name(self.round, self.weights.numpy())
        self.roster.load_state(state["standings"])
        bounds = (self.update_bound, self.buffer_bound)
        for bound, norms in zip(bounds, state["norms"], strict=True):
            bound.restore(norms)


def _below(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
