"""Cross-entropy over logits, whole or cut, smoothing of it, the likeliest token."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import (
    _VocabParallelCrossEntropy,
    vocab_parallel_cross_entropy,
)
from torch import Tensor
from torch.autograd.function import once_differentiable


class Extra(NamedTuple):
    """What the gradient has beside that of the cross-entropy."""

    smoothing: float
    z_loss: float


class _CrossEntropy(torch.autograd.Function):
    """PyTorch's cross-entropy with its backward pass in the memory of the forward pass.

    The log-probabilities become the gradient.
    PyTorch's own makes two more tensors as large as the logits, and fills one of them with zeros.
    """

    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, labels_n: Tensor, vocab: int, extra: Extra) -> Tensor:
        dtype = torch.promote_types(logits_nv.dtype, torch.float32)
        log_p_nv = torch.log_softmax(logits_nv[:, :vocab], dim=-1, dtype=dtype)
        loss_n = -log_p_nv.gather(1, labels_n[:, None]).squeeze(1)
        log_z_n = None
        if extra.z_loss:
            log_z_n = loss_n + logits_nv.gather(1, labels_n[:, None]).squeeze(1).to(dtype)
        ctx.save_for_backward(log_p_nv, labels_n, log_z_n)
        ctx.like = logits_nv.dtype, logits_nv.shape[1] - vocab
        ctx.extra = extra
        return loss_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, None, None, None]:
        # Changed in place, so that autograd itself refuses a second backward pass.
        log_p_nv, labels_n, log_z_n = ctx.saved_tensors
        smoothing = ctx.extra.smoothing
        grad_nv = log_p_nv.exp_()
        if log_z_n is not None:
            grad_nv.mul_((1.0 + 2.0 * ctx.extra.z_loss * log_z_n)[:, None])
        grad_nv[torch.arange(len(labels_n), device=labels_n.device), labels_n] -= 1.0 - smoothing
        if smoothing:
            grad_nv -= smoothing / grad_nv.shape[1]
        grad_nv.mul_(grad_n[:, None])
        dtype, padding = ctx.like
        grad_nv = grad_nv.to(dtype)
        return F.pad(grad_nv, (0, padding)) if padding else grad_nv, None, None, None


def cross_entropy(
    logits_nv: Tensor, labels_n: Tensor, vocab: int, smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """-log softmax(logits)[label] in nats, [n], in fp32 (fp64 for fp64 logits).

    logits_nv: [n, V]; labels_n: [n] below `vocab`.
    Columns from `vocab` on are padding: they take no part and get no gradient.
    smoothing: the gradient is that of the loss whose label has the probability 1 - smoothing and
    each of the `vocab` tokens smoothing / vocab more (Szegedy et al. 2016); the value is not.
    z_loss: the gradient is that of the loss with z_loss x log(Z)^2 added, Z the sum of exp(logits)
    (Chowdhery et al. 2022, section 5); the value is not.
    The gradient can be taken once.
    """
    extra = Extra(smoothing, z_loss)
    loss: Tensor = _CrossEntropy.apply(logits_nv, labels_n, vocab, extra)  # type: ignore[no-untyped-call]
    return loss


class _CutWithZLoss(_VocabParallelCrossEntropy):
    """Megatron-core's cross-entropy over cut logits, with the gradient of a z-loss beside it.

    With p = softmax(logits) and a = 2 z_loss log(Z) of each label, that of both is (1 + a) p less 1
    at the label: (1 + a) times that of the cross-entropy, and a at the label. So nothing as large
    as the logits is kept beside p, which the cross-entropy keeps.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_sbv: Tensor, labels_sb: Tensor, z_loss: float, group: dist.ProcessGroup
    ) -> Tensor:
        local = logits_sbv.shape[-1]
        index_sb = labels_sb - group.rank() * local
        own_sb = (index_sb >= 0) & (index_sb < local)
        logit_sb = logits_sbv.gather(-1, index_sb.clamp(0, local - 1)[..., None]).squeeze(-1).float()
        logit_sb = torch.where(own_sb, logit_sb, 0.0)
        dist.all_reduce(logit_sb, group=group)
        # Afterwards, as it computes in the memory of the logits.
        loss_sb: Tensor = _VocabParallelCrossEntropy.forward(ctx, logits_sbv, labels_sb)
        ctx.slope_sb = 2.0 * z_loss * (loss_sb + logit_sb)
        return loss_sb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sb: Tensor) -> tuple[Tensor, None, None, None]:
        # Once: what a recomputation makes again can be read no second time.
        kept = SimpleNamespace(**vars(ctx), saved_tensors=ctx.saved_tensors)
        _, elsewhere_sb, index_n = kept.saved_tensors
        added_sb = ctx.slope_sb * grad_sb
        grad_sbv: Tensor = _VocabParallelCrossEntropy.backward(kept, grad_sb + added_sb)[0]
        grad_nv = grad_sbv.view(-1, grad_sbv.shape[-1])
        rows_n = torch.arange(len(grad_nv), device=grad_nv.device)
        grad_nv[rows_n, index_n] += added_sb.masked_fill(elsewhere_sb, 0.0).flatten()
        return grad_sbv, None, None, None


def cut_cross_entropy(
    logits_sbv: Tensor, labels_sb: Tensor, group: dist.ProcessGroup, z_loss: float = 0.0
) -> Tensor:
    """As `cross_entropy`, [s, b], of logits that the ranks of the tensor-parallel group have cut.

    logits_sbv: this rank's columns, those of padding very small; the memory is used.
    """
    if not z_loss:
        plain: Tensor = vocab_parallel_cross_entropy(logits_sbv, labels_sb)
        return plain
    loss: Tensor = _CutWithZLoss.apply(logits_sbv, labels_sb, z_loss, group)
    return loss


class _Smoothing(torch.autograd.Function):
    """Zeros, with the gradient that smoothing adds to that of the cross-entropy."""

    @staticmethod
    def forward(ctx: Any, logits_sbv: Tensor, labels_sb: Tensor, part: VocabularyPart) -> Tensor:
        ctx.save_for_backward(labels_sb)
        ctx.part = part
        ctx.shape, ctx.dtype = logits_sbv.shape, logits_sbv.dtype
        return torch.zeros(labels_sb.shape, dtype=torch.float32, device=labels_sb.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sb: Tensor) -> tuple[Tensor, None, None]:
        (labels_sb,) = ctx.saved_tensors
        part: VocabularyPart = ctx.part
        grad_sbv = torch.zeros(ctx.shape, dtype=torch.float32, device=grad_sb.device)
        grad_sbv[..., : part.valid] = -part.smoothing / part.vocab
        own = (labels_sb >= part.first) & (labels_sb < part.first + part.valid)
        index = (labels_sb - part.first).clamp(0, ctx.shape[-1] - 1)[..., None]
        grad_sbv.scatter_add_(-1, index, part.smoothing * own.float()[..., None])
        return (grad_sbv * grad_sb[..., None]).to(ctx.dtype), None, None


@dataclass(frozen=True)
class VocabularyPart:
    """The logits of one tensor-parallel rank."""

    first: int
    """The token of its first logit."""
    valid: int
    """Logits that belong to tokens; what follows is padding."""
    vocab: int
    """Tokens of all ranks."""
    smoothing: float


def smoothing_gradient(logits_sbv: Tensor, labels_sb: Tensor, part: VocabularyPart) -> Tensor:
    """Zeros [s, b] to add to the cross-entropy, which give it the gradient of a smoothed one.

    That is smoothing x (label's logit - mean of all logits), whose gradient each rank knows of its
    own logits, so that nothing is communicated. (Megatron-core's own smoothing divides by a rank's
    part of the vocabulary and counts padding.)
    """
    zeros: Tensor = _Smoothing.apply(logits_sbv, labels_sb, part)  # type: ignore[no-untyped-call]
    return zeros


def cut_losses(
    logits_sbv: Tensor, labels_sb: Tensor, vocab: int, group: dist.ProcessGroup, extra: Extra
) -> Tensor:
    """As `cross_entropy`, [s, b], of logits that the ranks of the tensor-parallel group have cut.

    logits_sbv: this rank's columns [s, b, V / TP]; the memory is used.
    """
    local = logits_sbv.shape[-1]
    first = group.rank() * local
    valid = min(max(vocab - first, 0), local)
    if valid < local:
        logits_sbv[..., valid:].fill_(torch.finfo(logits_sbv.dtype).min)
    added: list[Tensor] = []  # first, as the losses may be computed in the memory of the logits
    if extra.smoothing:
        part = VocabularyPart(first, valid, vocab, extra.smoothing)
        added.append(smoothing_gradient(logits_sbv, labels_sb, part))
    losses_sb = cut_cross_entropy(logits_sbv, labels_sb, group, extra.z_loss)
    return sum(added, losses_sb)


def likeliest(logits_sbv: Tensor, vocab: int, group: dist.ProcessGroup | None) -> Tensor:
    """The token with the largest logit, [s, b]; the first of equal ones.

    logits_sbv: [s, b, V], or this rank's columns of them, [s, b, V / TP].
    vocab: columns from it on are padding and take no part. group: of the ranks with the others.
    """
    rank = 0 if group is None else group.rank()
    first = rank * logits_sbv.shape[-1]
    mine_sbv = logits_sbv[..., : max(vocab - first, 0)]
    if group is None:
        return mine_sbv.argmax(-1)
    if mine_sbv.shape[-1]:
        largest_sb, index_sb = mine_sbv.max(-1)
    else:  # all columns of this rank are padding
        largest_sb = logits_sbv.new_full(logits_sbv.shape[:-1], -torch.inf)
        index_sb = torch.zeros(largest_sb.shape, dtype=torch.int64, device=largest_sb.device)
    overall_sb = largest_sb.clone()
    dist.all_reduce(overall_sb, dist.ReduceOp.MAX, group=group)
    found_sb = torch.where(largest_sb == overall_sb, index_sb + first, vocab)
    dist.all_reduce(found_sb, dist.ReduceOp.MIN, group=group)
    return found_sb


def rank_of_label(
    logits_sbv: Tensor, labels_sb: Tensor, vocab: int, group: dist.ProcessGroup | None
) -> Tensor:
    """How many tokens come before the label, [s, b]: with a larger logit, or equal and earlier.

    Arguments as `likeliest`, whose token has the rank 0.
    """
    first = (0 if group is None else group.rank()) * logits_sbv.shape[-1]
    mine_sbv = logits_sbv[..., : max(vocab - first, 0)]
    own_sb = (labels_sb >= first) & (labels_sb < first + mine_sbv.shape[-1])
    index_sb1 = (labels_sb - first).clamp(0, logits_sbv.shape[-1] - 1)[..., None]
    logit_sb = torch.where(own_sb, logits_sbv.gather(-1, index_sb1).squeeze(-1), -torch.inf)
    if group is not None:
        dist.all_reduce(logit_sb, dist.ReduceOp.MAX, group=group)
    logit_sb1 = logit_sb[..., None]
    earlier = torch.arange(first, first + mine_sbv.shape[-1], device=labels_sb.device) < labels_sb[..., None]
    before_sb = ((mine_sbv > logit_sb1) | ((mine_sbv == logit_sb1) & earlier)).sum(-1)
    if group is not None:
        dist.all_reduce(before_sb, group=group)
    return before_sb
