"""Folders as finished runs leave them, made without a run."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gwpf_baseline.config import compose_config
from gwpf_baseline.records.history import History, RoundRecord


def make_record(number: int, **changes: Any) -> RoundRecord:
    """Make the record of a round that costs 1 kB up and 2 kB down."""
    record = RoundRecord(
        round=number,
        seconds=0.1 * number,
        test_accuracy=1 - 1 / (number + 1),
        test_loss=1 / number,
        train_loss=1 / (number + 2),
        uplink_bytes=1000,
        downlink_bytes=2000,
        cumulative_uplink_bytes=1000 * number,
        cumulative_downlink_bytes=2000 * number,
        dense_bytes=12000 * number,
        frozen_fraction=None,
        sent_fraction=None,
        clients=10,
        failures=0,
        compute_seconds=0.5,
        modelled_seconds=2.0 * number,
        uplink_bits_per_parameter=8.0 * number,
        downlink_bits_per_parameter=32.0,
        csr_bytes=1500,
        mean_accuracy=0.5 + 0.01 * number,
        uplink_value_bytes=600,
        uplink_position_bytes=300,
        uplink_overhead_bytes=100,
        downlink_value_bytes=1500,
        downlink_buffer_bytes=500,
        slowest_client_seconds=1.5 * number,
        median_client_seconds=1.25,
    )
    return replace(record, **changes)


RECORDS = [make_record(number) for number in range(1, 4)]
composed = functools.cache(lambda *overrides: compose_config(overrides))


def make_run(
    folder: Path,
    *overrides: str,
    records: Sequence[RoundRecord] = RECORDS,
    metric: str = "accuracy",
    **values: Any,
) -> Path:
    """Write the files of a run that are read, as a server writes them."""
    cfg = composed(*overrides).copy()
    OmegaConf.set_struct(cfg, False)
    for key, value in {"num_rounds": len(records), **values}.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    history = History(folder)
    OmegaConf.save(cfg, folder / "config.yaml")
    for record in records:
        history.add(record)
    history.write_summary(
        method=cfg.method.name,
        dataset=cfg.dataset.name,
        model=cfg.model.name,
        seed=cfg.seed,
        parameters=50,
        metric=metric,
    )
    history.close()
    return folder
