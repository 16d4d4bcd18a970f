"""Checkpoints as models, opened without Megatron and without a process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ModelConfig
from parallel.checkpoint.audit import saved_model
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint. weights: canonical names, fp32, read at each access. positions: the longest sequence."""

    reader: CheckpointReader
    config: ModelConfig
    weights: Mapping[str, Tensor]
    logit_scale: float
    positions: int
    tokenizer: Path | None

    @property
    def name(self) -> str:
        """Name of the run, or of the folder where the checkpoint names none."""
        return str(self.reader.config.get("name") or self.reader.folder.name)


def open_trained(checkpoint: Path | str) -> Trained:
    """Opens a run folder, a `checkpoints` folder or a step folder.

    Raises UserError where there is no checkpoint, it is damaged, its vocabulary size is not known, or it
    does not hold the model that it describes.
    """
    from model.weights.init import logit_scale

    reader = open_checkpoint(checkpoint)
    model = saved_model(reader)
    return Trained(
        reader,
        model.config,
        reader.weights(),
        logit_scale(model.config),
        model.positions,
        reader.tokenizer_path,
    )
