"""How configurations, layouts, machines and losses are refused, tried for the list of refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.loss_kernels import LossKernelName
from parallel.config import Fp8Config, ParallelConfig
from parallel.hardware.fused_losses import check_loss_kernel
from parallel.hardware.precision import Machine, numerics_for
from parallel.topology import Layout, check_layout
from tests.parallel.training import given, run_config

MODEL = given(num_layers=6, hidden_size=32, num_attention_heads=4, vocab_size=120)


@dataclass(frozen=True)
class Refusal:
    """A configuration that is refused, with the line that says so."""

    what: str
    """In a table's words."""
    message: str
    """A regular expression for the essential part of the line."""
    attempt: Callable[[], Any]
    """Raises it."""

    def line(self) -> str:
        """The line a user reads. Raises AssertionError where nothing is refused."""
        try:
            self.attempt()
        except UserError as error:
            return str(error)
        except ValidationError as error:
            return str(error.errors()[0]["ctx"]["error"])
        raise AssertionError(f"not refused: {self.what}")


def layout(world: int, model: dict[str, Any] | None = None, **parallel: Any) -> Layout:
    """A layout of the small model."""
    return check_layout(ParallelConfig(**parallel), ModelConfig(**(MODEL | (model or {}))), world)


def of_layout(
    what: str, message: str, world: int, model: dict[str, Any] | None = None, **parallel: Any
) -> Refusal:
    """A layout of the small model on so many processes."""
    return Refusal(what, message, lambda: layout(world, model, **parallel))


def of_run(what: str, message: str, **changes: Any) -> Refusal:
    """A run, by what its sections change."""
    return Refusal(
        what,
        message,
        lambda: run_config(
            changes.get("model"),
            changes.get("parallel"),
            changes.get("train"),
            data=changes.get("data"),
            **changes.get("optimizer", {}),
        ),
    )


def of_machine(
    what: str,
    message: str,
    machine: Machine,
    precision: str = "auto",
    kernels: str = "auto",
    recipe: str = "none",
) -> Refusal:
    """Formats and kernels on a machine."""
    return Refusal(what, message, lambda: numerics_for(precision, kernels, Fp8Config(recipe=recipe), machine))


def of_losses(
    what: str, message: str, name: LossKernelName, version: str | None = None, gpu: bool = True
) -> Refusal:
    """A kernel of losses in bf16 on a machine."""
    return Refusal(what, message, lambda: check_loss_kernel(name, torch.bfloat16, version, gpu=gpu))
