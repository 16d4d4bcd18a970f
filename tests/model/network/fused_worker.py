"""Losses of Liger-Kernel by Triton's interpreter beside ours, written to a file.

A process of its own: TRITON_INTERPRET has to be in the environment before Triton is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton.language as tl
from liger_kernel.ops import cross_entropy
from torch import Tensor

from model import loss_kernels
from model.network.fused_losses import Projection, liger_losses
from tests.model.network.fused_models import CAPPED, CASES, errors


class Argument(float):
    """A number as compiled kernels get it, which they convert; the interpreter hands on a float."""

    def to(self, _: Any) -> Argument:
        return self


def tanh(x: Any) -> Any:
    """A GPU's own is unknown to the interpreter."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


def interpreted(x_nh: Tensor, labels_n: Tensor, head: Projection, rows: int) -> Tensor:
    cap = None if head.soft_cap is None else Argument(head.soft_cap)
    return liger_losses(x_nh, labels_n, head._replace(soft_cap=cap), rows)


def main(output: str) -> None:
    """Errors of every case, as JSON."""
    cross_entropy.tanh = tanh
    loss_kernels.LEAST = 1  # so that there are several parts
    extras: dict[str, Any] = {"smoothing": 0.1, "z_loss": 0.02}
    found = {name: errors(interpreted, fields, torch.float32) for name, fields in CASES.items()}
    found["capped"] = errors(interpreted, CAPPED, torch.float32)
    found["smoothed, with z-loss"] = errors(interpreted, {}, torch.float32, **extras)
    found["all of them"] = errors(interpreted, CAPPED | {"family": "bert"}, torch.float32, **extras)
    found["bf16"] = errors(interpreted, {"tie_embeddings": False}, torch.bfloat16, **extras)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
