"""`schedule.branch`: the branches of a model in training are warmed up.

Nothing of it is in checkpoints: it is a function of the steps done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.layers.branch_share import BranchShares
from pretrain.config.schema import RunConfig


def branch_shares(config: RunConfig, chunks: Sequence[Any]) -> BranchShares | None:
    """What the layers of these model chunks read, to be filled before each step.

    None without a warm-up: then nothing is added to any layer.
    """
    branch = config.schedule.branch
    if branch.steps is None:
        return None
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    return BranchShares(layers, branch.kind, branch.steps, config.model.num_layers)


def remark(config: RunConfig) -> str:
    """What is unusual about a warm-up, in words; empty where nothing is."""
    last, steps = config.schedule.branch.last_step(config.model.num_layers), config.train.steps
    if last <= steps:
        return ""
    return (
        f"schedule.branch.steps={config.schedule.branch.steps} ends the warm-up of "
        f"{config.model.num_layers} layers at step {last}, after the run (train.steps={steps}): "
        "no checkpoint of it can be exported"
    )
