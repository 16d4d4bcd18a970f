"""Saving, loading and comparing engines of the tiny model. Runs inside ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.fragments import flat_state
from parallel.checkpoint.loader import load
from parallel.checkpoint.reader import open_checkpoint
from parallel.checkpoint.writer import save
from parallel.engine.engine import Engine
from pretrain.config.schema import RunConfig


def keep(engine: Engine, config: RunConfig, folder: Path, step: int) -> None:
    """Saves as a run does."""
    save(
        engine,
        folder,
        step,
        progress={"optimizer_step": step},
        config=config.model_dump(mode="json"),
        versions={},
        extra={"tokenizer.model": b"none"},
    )


def bring(engine: Engine, folder: Path) -> bool:
    """Loads the newest checkpoint; returns whether random states came with it."""
    return load(engine, open_checkpoint(folder))


def state(engine: Engine) -> list[Tensor]:
    """Copies of all that a step changes.

    Weights, masters, random states, and all that the optimizer keeps, whatever its name.
    """
    from parallel.checkpoint.random_state import rng_states

    tensors = [named.parameter.detach().clone() for named in engine.parameters]
    for group in range(len(engine.groups)):
        tensors.append(flat_state(engine, group)["master"].clone())
    for kept in optimizer_of(engine).state.values():
        tensors += [torch.as_tensor(value).clone() for _, value in sorted(kept.items())]
    return tensors + [one.clone() for _, one in sorted(rng_states().items())]


def optimizer_of(engine: Engine) -> torch.optim.Optimizer:
    """The one that was made for the run, whatever DeepSpeed puts around it."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer if engine.zero else engine.optimizer
    return optimizer


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Bit for bit."""
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
