"""What every method's Flower client shares: following the model, training, answering.

A method adds what it sends of what was learned; the model's changes, what was not sent,
what got lost on its way, and the rounding of what was sent are looked after here.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.client import Client, NumPyClient
from flwr.common import (
    Code,
    Config,
    FitIns,
    FitRes,
    GetPropertiesIns,
    GetPropertiesRes,
    NDArrays,
    Scalar,
    Status,
)

from gwpf_baseline.exchange.coding import Buffer, WireError
from gwpf_baseline.exchange.header import Header, Kind
from gwpf_baseline.exchange.payload import (
    Part,
    Reader,
    Writer,
    from_parameters,
    is_finite,
    to_parameters,
    vector_checksum,
)
from gwpf_baseline.learning.flat_model import FlatModel
from gwpf_baseline.learning.method_client import (
    DivergedError,
    LostState,
    MethodClient,
    Task,
)
from gwpf_baseline.learning.state import ClientState, StateStore
from gwpf_baseline.learning.training import Batches, TrainingConfig
from gwpf_baseline.records.checkpoint import (
    CheckpointFolder,
    StateError,
    is_checkpoint_name,
    save_state,
)
from gwpf_baseline.utils import ConfigError, is_whole, one_line

log = logging.getLogger(__name__)


# pylint: disable-next=abstract-method  # which a method fills in
class SyncClient(MethodClient, NumPyClient):
    """A Flower client that follows a sparsely sent model and trains on it.

    Parameters
    ----------
    store : StateStore
        Holds all that outlives a call.
    model, initial, batches, training : object
        As of :class:`~gwpf_baseline.learning.method_client.MethodClient`.
    saved : CheckpointFolder, optional
        Where to write its state when the server makes a checkpoint.
    found : sequence of CheckpointFolder, default none
        Where to find its state if the store holds none, of the checkpoint that the
        server names.
    **options : object
        `config` and `quantization`, as of the same.
    """

    def __init__(
        self,
        store: StateStore,
        model: FlatModel,
        initial: torch.Tensor,
        batches: Batches,
        training: TrainingConfig,
        *,
        saved: CheckpointFolder | None = None,
        found: Sequence[CheckpointFolder] = (),
        **options: Any,
    ) -> None:
        super().__init__(model, initial, batches, training, **options)
        self.store = store
        self.saved = saved
        self.found = found

    def to_client(self) -> Client:
        """Return the client that Flower calls."""
        return _PayloadClient(self)

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Follow the model, train, and answer with what the method sends.

        Parameters
        ----------
        parameters : list of numpy.ndarray
            The server's payload: one array, uint8 ``(n,)``.
        config : dict
            ``round``, the round's number, which the learning rate follows;
            ``committed``, the name of the last whole checkpoint, if there is one.

        Returns
        -------
        parameters : list of numpy.ndarray
            The answer's payload: one array, uint8 ``(n,)``.
        num_examples : int
            The client's examples.
        metrics : dict
            ``train_loss``, the mean over the local iterations, and
            ``compute_seconds``, the wall time of this call; empty where nothing was
            learned.

        Raises
        ------
        WireError
            The payload is not of this method, model or release.
        """
        answer, num_examples, metrics = self.answer(parameters[0].data, config)
        return [np.frombuffer(answer, np.uint8)], num_examples, metrics

    def answer(
        self, payload: Buffer, config: dict[str, Scalar]
    ) -> tuple[bytes, int, dict[str, Scalar]]:
        """Do what :meth:`fit` does, from payload to payload.

        Parameters
        ----------
        payload : bytes or memoryview
            The server's payload.
        config : dict
            As of :meth:`fit`.

        Returns
        -------
        payload : bytes
            The answer's.
        num_examples, metrics : object
            As of :meth:`fit`.

        Raises
        ------
        WireError
            As by :meth:`fit`.
        """
        started = time.perf_counter()
        self.server_round = _round(config)
        committed = _checkpoint(config, "committed")
        state = self.load_state(committed)
        reader = Reader(payload, self.name, self.initial.numel())
        try:
            task = self.follow(reader, state)
        except LostState as lost:
            # As it was: the message may have been followed half the way.
            self._settle_for_good(reader.header, self.load_state(committed))
            header = self._header(reader.header, Kind.LOST, lost.version)
            return Writer(header).payload(), len(self.batches), {}
        writer = Writer(self._header(task.header, Kind.UPDATE, state.version, task))
        try:
            loss = self.upload(task, state, writer)
            sound = True
        except DivergedError:
            loss, sound = None, False
        spoilt = _forget_what_is_not_finite(state)
        if spoilt or not sound:
            log.warning("round %d did not stay finite: dropped", self.server_round)
            self.store.save(state)
            header = self._header(task.header, Kind.DIVERGED, state.version)
            return Writer(header).payload(), len(self.batches), {}
        metrics: dict[str, Scalar] = {}
        if loss is not None:
            metrics["train_loss"] = loss
        if writer.kind is Kind.UPDATE:
            state.uploaded = task.header.exchange
            if loss is not None:
                buffers = self.model.buffer_vector()
                writer.vector(buffers.numpy(), Part.BUFFERS)
        self.store.save(state)
        metrics["compute_seconds"] = time.perf_counter() - started
        return writer.payload(), len(self.batches), metrics

    def follow(self, reader: Reader, state: ClientState) -> Task:
        """Bring the client's copy of the model up to date.

        Parameters
        ----------
        reader : Reader
            The server's payload.
        state : ClientState
            The state; its weights and version move on.

        Returns
        -------
        Task
            What the server asks for.

        Raises
        ------
        LostState
            The payload builds on what this client does not hold; the argument is the
            version it can start from.
        WireError
            The payload is damaged.
        """
        header = reader.header
        size = self.initial.numel()
        if header.kind is Kind.MODEL:
            weights = torch.from_numpy(self.read_model(reader, state).copy())
        elif header.kind in (Kind.CHANGES, Kind.VALUES):
            weights = self._known_weights(header, state)
            self.read_change(reader, weights.numpy(), state)
        else:
            raise WireError(f"a server does not send {header.kind.name}")
        mask = reader.bitmap(size) if header.with_mask else None
        buffers = None
        if not header.follow_up:
            numel = sum(b.numel() for b in self.model.buffers)
            buffers = torch.from_numpy(reader.vector(numel, part=Part.BUFFERS).copy())
        reader.finish()
        if not header.with_mask:
            # pylint: disable-next=assignment-from-none  # a method may have none
            mask = self.derive_mask(header, weights, state)
        self._settle_if_used(header, state)
        state.version = header.exchange - 1
        if not self.dense_downlink:
            state.arrays["weights"] = weights.numpy()
        return Task(header, weights, buffers, mask)

    def get_properties(self, config: Config) -> dict[str, Scalar]:
        """Say which partition this is, and write the state if a checkpoint is made.

        Parameters
        ----------
        config : dict
            ``checkpoint``: the name of the one to write the state for, and
            ``committed``, that of the one before. Where to, only this client's own
            configuration says.

        Returns
        -------
        dict
            ``partition-id``.
        """
        checkpoint = _checkpoint(config, "checkpoint")
        if checkpoint and self.saved is not None:
            committed = _checkpoint(config, "committed")
            client = self.batches.client
            file = self.saved.client_file(checkpoint, client)
            save_state(file, self.load_state(committed).to_save(client))
            # The new one counts once the server says so.
            self.saved.prune(client, keep=(committed, checkpoint))
        return {"partition-id": self.batches.client}

    def load_state(self, committed: str = "") -> ClientState:
        """Return the state: what is kept, else a checkpoint's, else a new one.

        Parameters
        ----------
        committed : str, default ""
            The name of the checkpoint that counts; empty for none.

        Returns
        -------
        ClientState
            The state.

        Raises
        ------
        ConfigError
            The checkpoint's file is damaged, or none of this client's.
        """
        state = self.store.load()
        if state is not None:
            return state
        client, size = self.batches.client, self.initial.numel()
        for folder in self.found if committed else ():
            saved = folder.client_state(committed, client)
            if saved is not None:
                try:
                    return ClientState.restore(saved, client, size)
                except StateError as error:
                    file = folder.client_file(committed, client)
                    allowed = f"the client's own checkpoint ({error})"
                    raise ConfigError("resume", file, allowed) from error
        return ClientState()

    def _settle_if_used(self, header: Header, state: ClientState) -> None:
        # What has been settled must not be again, after an exchange without an upload.
        if header.used == state.uploaded == state.version + 1:
            self.settle(state)
        elif header.used > state.uploaded:
            # The state is a checkpoint's, from before the upload that was used: what
            # that was made of must not be sent a second time.
            log.warning("a state from before the upload of exchange %d", header.used)
            state.arrays.pop("residual", None)
        elif header.used < state.uploaded and 0 < header.base == state.uploaded - 1:
            # The server has read that upload and left it out, as far too long. What it
            # was made of would make every one to come as long.
            state.arrays.pop("residual", None)

    def _settle_for_good(self, header: Header, state: ClientState) -> None:
        """Settle by a message that cannot be followed, as none will say it again.

        The server starts anew with a client that is lost, and forgets what it used.
        """
        self._settle_if_used(header, state)
        self.note_sent(state, np.zeros(self.initial.numel(), np.bool_))
        self.store.save(state)

    def _known_weights(self, header: Header, state: ClientState) -> torch.Tensor:
        held = state.version
        if "weights" in state.arrays and held >= header.base:
            # What the server sends are values, not differences: holding more than it
            # knows of (its client's answer got lost) does no harm.
            return torch.from_numpy(state.own("weights"))
        if held > 0 and "weights" not in state.arrays:
            raise LostState(-1)
        if header.base > 0:
            raise LostState(0)
        if header.checksum != vector_checksum(self.initial.numpy()):
            # Another release of torch draws other weights from the same seed.
            raise LostState(-1)
        return self.initial.clone()

    def _header(
        self, asked: Header, kind: Kind, base: int, task: Task | None = None
    ) -> Header:
        checksum = 0
        if task is not None and task.mask is not None and not asked.with_mask:
            checksum = vector_checksum(task.mask)
        return Header(
            self.name, kind, asked.exchange, base, asked.length, checksum=checksum
        )


def _round(config: dict[str, Scalar]) -> int:
    number = config.get("round", 1)
    if not is_whole(number, 1):
        raise WireError(f"round {one_line(number)}: a whole number from 1 on")
    return number


def _checkpoint(config: dict[str, Scalar], key: str) -> str:
    name = config.get(key, "")
    if name != "" and not is_checkpoint_name(name):
        raise WireError(f"{key} {one_line(name)}: the name of a checkpoint")
    return str(name)


def _forget_what_is_not_finite(state: ClientState) -> list[str]:
    """Drop the arrays that would spoil all rounds to come, and return their names."""
    spoilt = [name for name, array in state.arrays.items() if not is_finite(array)]
    for name in spoilt:
        del state.arrays[name]
    return spoilt


class _PayloadClient(Client):
    """What Flower calls: takes payloads out of its messages and puts them in.

    Flower's own wrapper of a ``NumPyClient`` would read them with ``numpy.load`` and
    write them with ``numpy.save``, see :func:`to_parameters`.
    """

    def __init__(self, client: SyncClient) -> None:
        self.client = client

    def fit(self, ins: FitIns) -> FitRes:
        """Let the client answer a message."""
        payload = from_parameters(ins.parameters)
        answer, num_examples, metrics = self.client.answer(payload, ins.config)
        parameters = to_parameters(answer)
        return FitRes(Status(Code.OK, ""), parameters, num_examples, metrics)

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        """Ask the client who it is."""
        properties = self.client.get_properties(ins.config)
        return GetPropertiesRes(Status(Code.OK, ""), properties)
