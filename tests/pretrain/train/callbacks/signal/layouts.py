"""What signal health measures under several layouts. Runs inside ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.config import RecomputeConfig
from pretrain.config.schema import RunConfig
from pretrain.data.samples import open_samples
from pretrain.train.build import build_engine
from pretrain.train.callbacks.base import Callback
from pretrain.train.callbacks.signal.health import SignalHealth
from pretrain.train.loop import Trainer
from tests.distributed import rebuild
from tests.pretrain.small import small_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor": 2},
    "TP2 + SP": {"tensor": 2, "sequence_parallel": True},
    "PP2, VP2": {"pipeline": 2, "virtual_stages": 2},
    "DP2, ZeRO-1": {"zero": 1},
    "DP2, ZeRO-3": {"zero": 3},
}
CUT: dict[str, dict[str, Any]] = {
    "CP2": {"context": 2},
    "CP2, full recompute": {"context": 2, "recompute": RecomputeConfig(granularity="full")},
}
"""Layouts that cut sequences."""


class Kept(Callback):
    """The layers of every full measurement."""

    def __init__(self) -> None:
        self.found: list[list[dict[str, float]]] = []

    def on_signal(self, trainer: Any, short: dict[str, float], layers: Sequence[dict[str, float]]) -> None:
        self.found.append([dict(layer) for layer in layers])


def measured(data: str, runs: str, layouts: Sequence[str | None]) -> list[Any]:
    """For each layout (None: as many replicas as ranks) the rows of two steps; on rank 0 only."""
    return [_rows(_config(data, f"{runs}/{index}", name)) for index, name in enumerate(layouts)]


def _config(data: str, runs: str, layout: str | None) -> RunConfig:
    config = small_config(Path(data), Path(runs), 2, scheme="b2t", num_layers=4)
    for key, value in ({} if layout is None else (LAYOUTS | CUT)[layout]).items():
        setattr(config.parallel, key, value)
    config.train.global_batch_size, config.train.micro_batch_size = 8, 2
    return config


def _rows(config: RunConfig) -> Any:
    data = {split: open_samples(config, config.task.samples, split) for split in ("train", "validation")}
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    engine = build_engine(config, rebuild(config.parallel, config.model))
    trainer = Trainer(config, folder, engine, data["train"], data["validation"], [])
    first = torch.distributed.get_rank() == 0
    kept = Kept()
    trainer.callbacks += [kept, SignalHealth(1, reports=first)]
    trainer.run()
    return kept.found if first else None
