"""The residual join: the one place where a branch meets the stream, as a parameter-free module that
monitors can hook and a fused kernel can replace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.depth.folded import FoldedSublayer

if TYPE_CHECKING:
    from model.layers.joined import Follower
    from model.layers.torch_parts import RowLinear


def meta_device(config: TransformerConfig) -> AbstractContextManager[Any]:
    """Inside it tensors have no memory, where the whole model is built so."""
    return torch.device("meta") if config.init_model_with_meta_device else nullcontext()


def add_scaled(a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """a + scale b, the scale in at least fp32, any shape and format.

    A scale that is a tensor is a scalar on the CPU, for compiled code that many layers share.
    """
    # On CPUs `alpha` is rounded to the format of the tensors, by up to 0.4 % in bfloat16
    # (torch 2.13); the factor of a product is not.
    if isinstance(scale, Tensor) or (scale != 1.0 and a.device.type == "cpu" and a.dtype.itemsize < 4):
        return a + b * scale
    return torch.add(a, b, alpha=scale)


def join(
    residual: Tensor | None,
    branch: Tensor,
    bias: Tensor | None,
    layer_input: Tensor | None,
    residual_scale: float,
    branch_scale: float | Tensor,
    skip_scale: float,
    share: Tensor | None = None,
) -> Tensor:
    """residual_scale R + share branch_scale (b + bias) + skip_scale x_layer, [s, b, h].

    residual and layer_input are None where their factor is 0.
    share: a scalar on the device, None for 1.
    """
    if bias is not None:
        branch = branch + bias
    if share is not None:
        branch = branch * share
    if residual is not None:
        scaled = residual if residual_scale == 1.0 else residual * residual_scale
        stream = add_scaled(scaled, branch, branch_scale)
    elif isinstance(branch_scale, Tensor) or branch_scale != 1.0:
        stream = branch * branch_scale
    else:
        stream = branch
    return stream if layer_input is None else add_scaled(stream, layer_input, skip_scale)


class _Gated(torch.autograd.Function):
    """As `gated`. The gate's gradient is one product of two streams, without a third between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate)
        return torch.addcmul(x, x, F.silu(gate).to(x.dtype), value=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, gate = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return gradient, None
        both = torch.dot(x.flatten(), gradient.flatten()).to(gate.dtype).view(1)
        return gradient, torch.ops.aten.silu_backward(both, gate).neg_()


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x - silu(gate) stopgrad(x), of x [s, b, h] and gate [1]."""
    if torch.compiler.is_compiling():
        return torch.addcmul(x, x.detach(), F.silu(gate).to(x.dtype), value=-1)
    passed: Tensor = _Gated.apply(x, gate)  # type: ignore[no-untyped-call]
    return passed


class StreamGate(nn.Module):
    """x - silu(g) stopgrad(x): the stream shrinks on its way up, its gradient does not.

    Gradient-preserving activation scaling (Chen et al. 2025), g one learned scalar.
    Where the stream is cut along the sequence over tensor-parallel ranks, gradients of g are
    partial sums.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        with meta_device(config):
            self.gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.passed = False
        """Whether the join before has gated what comes next (`model/layers/joined.py`)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [s, b, h] -> the same shape and format."""
        passed, self.passed = self.passed, False
        return x if passed else gated(x, self.gate)


class ResidualJoin(nn.Module):
    """x' = residual_scale R + Dropout(branch_scale (b + bias)) + skip_scale x_layer.

    The middle of the equation in `model/depth/scheme.py`, in the units of `model/depth/folded.py`.
    Coefficients are Python floats. A join whose residual_scale is 0 does not read the residual.
    function: `join`, or `join` compiled, in training; evaluation has `join`.
    """

    def __init__(self, plan: FoldedSublayer, dropout: float) -> None:
        super().__init__()
        self.branch_scale = plan.branch_scale
        self.residual_scale = plan.residual_scale
        self.skip_scale = plan.skip_scale
        self.dropout = dropout
        self.function: Callable[..., Tensor] = join
        self.shared_branch_scale: Tensor | None = None
        """The same number for compiled code that layers with other numbers share."""
        self.share: Tensor | None = None
        """Of the branch, on the device, while `model/layers/branch_share.py` warms it up."""
        self.follower: Follower | None = None
        """What computes this and what follows it in one pass (`model/layers/joined.py`)."""
        self.product: list[RowLinear] = []
        """The branch's last linear layer, where its product adds onto the residual itself.

        In a list, or it would become a submodule.
        """
        self.added = False
        """Whether the next branch comes with the residual in it."""

    def offer(self, residual: Tensor) -> None:
        """Hands the residual [s, b, h] to the product of the branch that comes next.

        Where that can be in a pass of now: hooks on the join are to hear the branch alone.
        """
        if not self.product:
            return
        self.added = self.training and self.share is None and not self._forward_hooks
        if self.added:
            self.product[0].onto = residual, self.branch_scale

    def forward(self, residual: Tensor, branch: Tensor, bias: Tensor | None, layer_input: Tensor) -> Tensor:
        """Returns the new stream [s, b, h].

        residual, branch, layer_input: [s, b, h].
        bias: [h] or None, scaled and dropped out with the branch.
        """
        if self.added:
            self.added = False
            return branch
        read = residual if self.residual_scale != 0.0 else None
        source = layer_input if self.skip_scale != 0.0 else None
        if self.follower is not None and self.training and self.follower.alone:
            return self.follower(read, branch, bias, source, self.share)
        if self.dropout and self.training:
            # Dropout only zeroes and rescales, so the factor may follow it,
            # where the add carries it for free.
            branch, bias = F.dropout(branch if bias is None else branch + bias, self.dropout), None
        function = self.function if self.training else join
        shared = self.shared_branch_scale if torch.compiler.is_compiling() else None
        return function(
            read,
            branch,
            bias,
            source,
            self.residual_scale,
            self.branch_scale if shared is None else shared,
            self.skip_scale,
            self.share,
        )

    def terms(
        self, residual: Tensor, branch: Tensor, bias: Tensor | None, layer_input: Tensor
    ) -> tuple[Tensor, float | Tensor, Tensor]:
        """What `forward` adds and what it adds it to: (b, factor on it, the rest), in its units.

        Of the arguments of `forward`, without dropout. b and the rest are [s, b, h], detached.
        """
        branch = (branch if bias is None else branch + bias).detach()
        factor = self.branch_scale if self.share is None else self.branch_scale * self.share.float()
        kept = residual.detach()
        if self.residual_scale == 0.0:
            kept = layer_input.detach() * self.skip_scale
        elif self.skip_scale != 0.0:
            kept = torch.add(kept * self.residual_scale, layer_input.detach(), alpha=self.skip_scale)
        elif self.residual_scale != 1.0:
            kept = kept * self.residual_scale
        return branch, factor, kept

    @property
    def kernels(self) -> int:
        """Operations on whole activations that an uncompiled join without bias takes on a GPU.

        Each reads and writes memory that one kernel would touch once.
        A branch's factor costs nothing beside an addition.
        """
        reads = (self.residual_scale != 0.0) + (self.skip_scale != 0.0)
        return (
            reads
            + (self.residual_scale not in (0.0, 1.0))
            + (self.residual_scale == 0.0 and self.branch_scale != 1.0)
        )

    def extra_repr(self) -> str:
        """Coefficients, for printing a model."""
        return (
            f"residual={self.residual_scale:.6g}, branch={self.branch_scale:.6g}, "
            f"skip={self.skip_scale:.6g}, dropout={self.dropout}"
        )
