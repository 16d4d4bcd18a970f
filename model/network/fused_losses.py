"""Losses by functions of libraries that take the output projection along.

They make logits for some rows at a time, forward and again backward, and sum the projection's
gradient in place. What each can do: `model/loss_kernels.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.loss_kernels import LossKernelName, liger_budget
from model.network.losses import Extra


class Projection(NamedTuple):
    """The output projection, and what is made of its logits."""

    weight_vh: Tensor
    bias_v: Tensor | None
    soft_cap: float | None
    extra: Extra

    def of(self, vocab: int) -> Projection:
        """To the first tokens alone, without rows of padding behind them."""
        bias = None if self.bias_v is None else self.bias_v[:vocab]
        whole = len(self.weight_vh) == vocab  # whose gradient need not be copied into a larger one
        return self._replace(weight_vh=self.weight_vh if whole else self.weight_vh[:vocab], bias_v=bias)


class FusedLosses(Protocol):
    """What computes losses of rows that the projection reads."""

    def __call__(self, x_nh: Tensor, labels_n: Tensor, head: Projection, rows: int) -> Tensor:
        """As `cross_entropy`, [n]. rows: of which logits exist at once."""


def torch_losses(x_nh: Tensor, labels_n: Tensor, head: Projection, rows: int) -> Tensor:
    """By `torch.nn.functional.linear_cross_entropy`, in the format of the weights."""
    from torch.nn import LinearCrossEntropyOptions  # from torch 2.13 on

    losses_n: Tensor = torch.nn.functional.linear_cross_entropy(
        x_nh,
        head.weight_vh,
        labels_n,
        linear_bias=head.bias_v,
        reduction="none",
        options=LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None),
    )
    return losses_n


class _Liger(torch.autograd.Function):
    """Losses without smoothing and z-loss, and the gradient of those with them.

    Liger's own function of autograd has them in both.
    """

    @staticmethod
    def forward(
        ctx: Any, x_nh: Tensor, weight_vh: Tensor, bias_v: Tensor | None, labels_n: Tensor, head: Projection
    ) -> Tensor:
        ctx.save_for_backward(x_nh, weight_vh, bias_v, labels_n)
        ctx.soft_cap, ctx.extra = head.soft_cap, head.extra
        plain = {"bias": bias_v, "softcap": head.soft_cap, "compute_gradients": False}
        losses_n: Tensor = _liger(x_nh, weight_vh, labels_n, **plain)[0]
        return losses_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        x_nh, weight_vh, bias_v, labels_n = ctx.saved_tensors
        *_, grad_nh, grad_vh, grad_v = _liger(
            x_nh,
            weight_vh,
            labels_n,
            bias=bias_v,
            softcap=ctx.soft_cap,
            label_smoothing=ctx.extra.smoothing,
            lse_square_scale=ctx.extra.z_loss,
            accum_dtype=torch.promote_types(weight_vh.dtype, torch.float32),
            token_grad_output=grad_n,
            compute_gradients=True,
            weight_requires_grad=ctx.needs_input_grad[1],
        )
        return grad_nh, grad_vh, grad_v, None, None


def _liger(x_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, **options: Any) -> tuple[Any, ...]:
    """Losses [n] in fp32 and, last, the gradients of hidden states, weight and bias."""
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    budget = liger_budget(len(x_nh), x_nh.shape[1], len(weight_vh))
    made: tuple[Any, ...] = fused_linear_cross_entropy_forward(
        x_nh, weight_vh, labels_n, reduction="none", chunk_mem_const=budget, **options
    )
    return made


def liger_losses(x_nh: Tensor, labels_n: Tensor, head: Projection, rows: int) -> Tensor:
    """By Liger-Kernel, in fp32, as many rows at once as `rows_at_once`."""
    given = x_nh, head.weight_vh, head.bias_v, labels_n, head
    losses_n: Tensor = _Liger.apply(*given)  # type: ignore[no-untyped-call]
    return losses_n


FUSED_LOSSES: dict[LossKernelName, FusedLosses] = {
    "torch": torch_losses,
    "liger": liger_losses,
}
"""Of the entries of `LOSS_KERNELS` that take the projection along."""


def fused_losses(
    kernel: FusedLosses, hidden_sbh: Tensor, labels_bs: Tensor, head: Projection, size: int
) -> Tensor:
    """Losses [b, s] of what the output projection reads.

    size: positions of every sample whose logits exist at once.
    """
    batch, length = labels_bs.shape
    rows = min(max(1, size), length) * batch
    losses_n = kernel(hidden_sbh.flatten(0, 1), labels_bs.t().flatten(), head, rows)
    return losses_n.view(length, batch).t().contiguous()
