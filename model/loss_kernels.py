"""What computes the output projection and the cross-entropy, by name, and what each of them can do.

One table. Configuration, plan and machine ask it; the functions are in
`model/network/fused_losses.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

LossKernelName = Literal["local", "torch", "liger"]
"""`train.loss_kernel`."""
INSTEAD = "set train.loss_kernel=local, which train.loss_chunk cuts"
"""What refusals of the others advise."""


@dataclass(frozen=True)
class LossKernel:
    """What a way to compute losses needs, and what it has no form for."""

    package: str
    """That has it; "" for this one."""
    module: str = ""
    """Of the package, that has it."""
    extra: str = ""
    """Of ours, that brings the package along."""
    releases: str = ""
    """Of the package, that have it as it is called here."""
    gpu_only: bool = False
    """It has no form for CPUs."""
    rounds_losses: bool = False
    """Losses have the format of the weights."""
    own_chunks: bool = False
    """It decides by itself how many positions it takes at once."""
    lacks: tuple[str, ...] = ()
    """Settings that it has no form for but their defaults."""
    widens_gradient: bool = False
    """The projection's gradient is summed in fp32, then rounded to the weights' format."""
    copies: int = 1
    """Tensors of the logits' size that exist at once, in the format of the weights."""
    moves: int = 0
    """How often the logits' bytes are read or written, forward and backward."""

    @property
    def fused(self) -> bool:
        """Whether it takes the projection along, so that all logits never exist at once."""
        return bool(self.package)


# Moved by torch, an operator at a time: 7 forward (the logits written, their maximum, its
# difference and exponential read and written, their sum), the same backward, there 2 to scale them
# and 2 reads by products. By Liger: 2 forward; backward written, read twice and written by its
# kernel, read and written by the labels' weights, and read by two products.
LOSS_KERNELS: dict[LossKernelName, LossKernel] = {
    "local": LossKernel(""),
    "torch": LossKernel(
        "torch",
        module="torch.nn.modules.linear_cross_entropy",
        releases=">=2.13",
        rounds_losses=True,
        lacks=("model.logit_soft_cap", "train.label_smoothing", "train.z_loss"),
        moves=18,
    ),
    "liger": LossKernel(
        "liger-kernel",
        module="liger_kernel.ops.fused_linear_cross_entropy",
        extra="liger",
        releases=">=0.8.5,<0.9",  # as the extra in pyproject.toml
        gpu_only=True,
        own_chunks=True,
        widens_gradient=True,
        copies=2,
        moves=10,
    ),
}


LEAST = 256
"""Rows of logits that products of fused kernels have at least, so that they do not wait for memory.

A product reads the projection, and adds to its gradient, once for all rows of a part.
"""


def rows_at_once(rows: float, width: int, vocab: int) -> int:
    """Rows of logits [rows, vocab] that fused kernels hold at once: a power of two, or all.

    About as many numbers as the hidden states [rows, width] have, as Liger-Kernel decides by
    itself, and torch by its `aspect_ratio`; at least `LEAST`.
    """
    least = max(math.ceil(rows / -(-vocab // width)), LEAST)
    return min(math.ceil(rows), 1 << (least - 1).bit_length())


def liger_budget(rows: int, width: int, vocab: int) -> int:
    """Liger's `chunk_mem_const`, by which it takes as many as `rows_at_once`, or fewer.

    It allows logits to be so many times as large as the hidden states.
    """
    parts = -(-rows // rows_at_once(rows, width, vocab))
    if parts == 1:
        return -(-vocab // width)
    return max(1, -(-vocab // ((parts - 1) * width)) - 1)
