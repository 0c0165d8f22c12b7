"""What a run leaves behind: a record a round, and its files."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass
class RoundRecord:  # pylint: disable=too-many-instance-attributes  # a file's columns
    """One round, with the columns of ``history.csv`` in their order.

    Numbers are kept as plain Python ones, whatever they came as. A float that the
    method lacks, that was not measured in this round, or that is not finite (a loss
    that diverged) is None.

    Parameters
    ----------
    round : int
        Number of the round.
    seconds : float
        Wall time from the start of the run to the end of the round.
    test_accuracy, test_loss : float or None
        Of the global model on the test data; None if the round was not evaluated.
    train_loss : float or None
        Mean over the clients of the round.
    uplink_bytes, downlink_bytes : int
        Sums over the clients of the round.
    cumulative_uplink_bytes, cumulative_downlink_bytes : int
        Sums over the run so far.
    dense_bytes : int
        What FedAvg would have sent so far, both ways.
    frozen_fraction : float or None
        Share of the parameters that are frozen, in [0, 1].
    sent_fraction : float or None
        Share of the parameters that a client uploads, in [0, 1].
    clients : int
        Clients whose result was used.
    failures : int
        Clients whose result was lost or refused.
    compute_seconds : float or None
        What a client of the round computed for, as it measured, on average.
    modelled_seconds : float or None
        How long the run so far would have taken over the configured network; None if
        none is.
    uplink_bits_per_parameter, downlink_bits_per_parameter : float or None
        Bits that a client of the round sent and was sent for each parameter, on
        average; None if there was no client.
    csr_bytes : int or None
        What the clients sent, as compressed sparse rows, under ZeroFL; else None.
    mean_accuracy : float or None
        Of the mean of a random network on the test data; None if it is not random, or
        was not evaluated.
    uplink_value_bytes, downlink_value_bytes : int
        What values took, like the following a sum over the clients of the round.
    uplink_position_bytes, downlink_position_bytes : int
        What positions took: bitmaps.
    uplink_buffer_bytes, downlink_buffer_bytes : int
        What buffers took.
    uplink_overhead_bytes, downlink_overhead_bytes : int
        All else: headers; what was refused counts as overhead.
    slowest_client_seconds, median_client_seconds : float or None
        How long the slowest and the median client of the round would have taken over
        the configured network; None if none is, or if no client answered.

    Raises
    ------
    ValueError
        If a value cannot be read as its column's number.
    """

    round: int
    seconds: float
    test_accuracy: float | None
    test_loss: float | None
    train_loss: float | None
    uplink_bytes: int
    downlink_bytes: int
    cumulative_uplink_bytes: int
    cumulative_downlink_bytes: int
    dense_bytes: int
    frozen_fraction: float | None
    sent_fraction: float | None
    clients: int
    failures: int
    compute_seconds: float | None = None
    modelled_seconds: float | None = None
    uplink_bits_per_parameter: float | None = None
    downlink_bits_per_parameter: float | None = None
    csr_bytes: int | None = None
    mean_accuracy: float | None = None
    uplink_value_bytes: int = 0
    uplink_position_bytes: int = 0
    uplink_buffer_bytes: int = 0
    uplink_overhead_bytes: int = 0
    downlink_value_bytes: int = 0
    downlink_position_bytes: int = 0
    downlink_buffer_bytes: int = 0
    downlink_overhead_bytes: int = 0
    slowest_client_seconds: float | None = None
    median_client_seconds: float | None = None

    def __post_init__(self) -> None:
        """Bring every value to its column's type."""
        for column in fields(self):
            value = getattr(self, column.name)
            optional = column.type not in (int, float)
            if optional and value is None:
                continue
            whole = column.type in (int, int | None)
            try:
                # NumPy's float64 is a float too, but its repr is not a number.
                value = int(value) if whole else float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(f"{column.name}: {value!r} is no number") from error
            unmeasured = optional and not whole and not math.isfinite(value)
            setattr(self, column.name, None if unmeasured else value)


COLUMNS = tuple(column.name for column in fields(RoundRecord))
_BEFORE_THE_FIRST = RoundRecord(0, 0, None, None, None, 0, 0, 0, 0, 0, None, None, 0, 0)
#: What no number of a record reaches, so that no sum of them overflows.
LARGEST = 1e100
# What a run is measured by: for a language model, the perplexity exp(test_loss).
METRICS = ("accuracy", "perplexity")


def from_rows(rows: Iterable[Sequence[Any]]) -> list[RoundRecord]:
    """Turn rows of plain values, as `dataclasses.astuple` gives, back into records.

    Parameters
    ----------
    rows : iterable of sequences
        Values in the order of `COLUMNS`.

    Returns
    -------
    list of RoundRecord
        Equal to the bit to the records that the rows were made from.

    Raises
    ------
    ValueError
        If a row has another number of values, or one that is no number, or as large as
        `LARGEST`.
    """
    records = []
    for row in rows:
        if len(row) != len(COLUMNS):
            raise ValueError(f"{len(row)} values, but {len(COLUMNS)} columns")
        records.append(RoundRecord(*row))
        for column, value in vars(records[-1]).items():
            # So that no sum of them is more than a float holds; a NaN is not below.
            if value is not None and not abs(value) < LARGEST:
                raise ValueError(f"{column} is no number below {LARGEST}")
    return records


def read_history(folder: str | Path) -> list[RoundRecord]:
    """Read the ``history.csv`` of a run.

    Parameters
    ----------
    folder : str or Path
        The run's folder.

    Returns
    -------
    list of RoundRecord
        The rounds in the order in which they were written.

    Raises
    ------
    FileNotFoundError
        If the folder has no ``history.csv``.
    ValueError
        If the file is damaged; the message names the file and the line.
    """
    path = Path(folder) / "history.csv"
    # A byte that is no text becomes a cell that is no number, and so has its line.
    *lines, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    # What follows the last newline was cut off while it was written, perhaps within
    # a number: it cannot be trusted even where it has all its cells.
    if rest:
        raise ValueError(f"{path}, line {len(lines) + 1}: the line is incomplete")
    if lines[:1] != [",".join(COLUMNS)]:
        raise ValueError(f"{path}, line 1: the columns are not those of a history")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            records += from_rows([[cell or None for cell in line.split(",")]])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean cross-entropy in nats, at most about 1e304."""
    return math.exp(min(loss, 700.0))  # beyond that a float overflows


#: Written at a run's end, with what it comes to.
SUMMARY_FILE = "summary.json"


class History:
    """The records of a run, in memory and in the run's folder.

    A history that is already in the folder is replaced, but not before :meth:`restore`
    or the first record, so that a run which fails to resume destroys nothing.

    Parameters
    ----------
    folder : str or Path
        The run's folder; made if need be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records: list[RoundRecord] = []
        self._events: SummaryWriter | None = None

    def add(self, record: RoundRecord) -> None:
        """Append a round to ``history.csv`` and to the TensorBoard scalars, at once.

        Both are on file when this returns: a run that is killed loses only the round
        in progress.

        Parameters
        ----------
        record : RoundRecord
            The round that has just ended.
        """
        events = self._events or self._start()
        self.records.append(record)
        self._write(astuple(record), mode="a")
        for name, value in zip(COLUMNS[1:], astuple(record)[1:], strict=True):
            if value is not None:
                events.add_scalar(name, value, record.round)
        events.flush()

    def restore(self, records: Iterable[RoundRecord]) -> None:
        """Begin with the rounds of an earlier run that this one resumes, if any.

        Parameters
        ----------
        records : iterable of RoundRecord
            Its rounds up to the checkpoint. They replace those in the folder, which
            may go beyond the checkpoint and will be run again.
        """
        self._start()
        for record in records:
            self.add(record)

    def summary(
        self,
        *,
        method: str,
        dataset: str,
        model: str,
        seed: int,
        parameters: int,
        metric: str = "accuracy",
    ) -> dict[str, Any]:
        """Sum the run up.

        Parameters
        ----------
        method, dataset, model : str
            Names, as configured.
        seed : int
            The run's seed.
        parameters : int
            Number of the model's trainable parameters.
        metric : {"accuracy", "perplexity"}
            What the run is measured by.

        Returns
        -------
        dict
            The contents of ``summary.json``. ``final_accuracy`` is that of the last
            round that was evaluated; accuracies are None if none was, and
            ``traffic_ratio`` (total bytes ÷ dense bytes) if nothing was sent.
            Perplexities are None unless they are the metric.
        """
        last = self.records[-1] if self.records else _BEFORE_THE_FIRST
        accuracies = self._values("test_accuracy")
        means, csr = self._values("mean_accuracy"), self._values("csr_bytes")
        perplexities = []
        if metric == "perplexity":
            perplexities = [perplexity(loss) for loss in self._values("test_loss")]
        total = last.cumulative_uplink_bytes + last.cumulative_downlink_bytes
        return {
            "method": method,
            "dataset": dataset,
            "model": model,
            "seed": seed,
            "rounds": last.round,
            "parameters": parameters,
            "metric": metric,
            "final_accuracy": accuracies[-1] if accuracies else None,
            "best_accuracy": max(accuracies, default=None),
            "final_perplexity": perplexities[-1] if perplexities else None,
            "best_perplexity": min(perplexities, default=None),
            "total_uplink_bytes": last.cumulative_uplink_bytes,
            "total_downlink_bytes": last.cumulative_downlink_bytes,
            "dense_bytes": last.dense_bytes,
            "traffic_ratio": total / last.dense_bytes if last.dense_bytes else None,
            "seconds": last.seconds,
            "modelled_seconds": last.modelled_seconds,
            "uplink_bits_per_parameter": self._mean("uplink_bits_per_parameter"),
            "downlink_bits_per_parameter": self._mean("downlink_bits_per_parameter"),
            "total_csr_bytes": sum(csr) if csr else None,
            "final_mean_accuracy": means[-1] if means else None,
        }

    def _values(self, column: str) -> list[Any]:
        """Return a column's values, without what was not measured."""
        values = (getattr(record, column) for record in self.records)
        return [value for value in values if value is not None]

    def _mean(self, column: str) -> float | None:
        values = self._values(column)
        return math.fsum(values) / len(values) if values else None

    def write_summary(self, **run: Any) -> dict[str, Any]:
        """Write ``summary.json``.

        Parameters
        ----------
        **run
            The arguments of `summary`.

        Returns
        -------
        dict
            What was written.
        """
        summary = self.summary(**run)
        text = json.dumps(summary, indent=2, allow_nan=False)
        (self.folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
        return summary

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._events:
            self._events.close()

    def _start(self) -> "SummaryWriter":
        """Begin the files, in place of those that an earlier run left in the folder."""
        # A worker or a node, which writes none, would import it with every method.
        # pylint: disable-next=import-outside-toplevel
        from torch.utils.tensorboard import SummaryWriter

        events = self.folder / "tensorboard"
        # TensorBoard would show the rounds of the old files beside the new ones.
        for old in events.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = SummaryWriter(str(events))
        self._write(COLUMNS, mode="w")
        return self._events

    def _write(self, row: Sequence[Any], mode: str) -> None:
        path = self.folder / "history.csv"
        with open(path, mode, newline="", encoding="utf-8") as file:
            # csv writes a float by its repr, and None as an empty cell.
            csv.writer(file, lineterminator="\n").writerow(row)
