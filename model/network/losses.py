"""Cross-entropy per token, over logits that one process holds whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _CrossEntropy(torch.autograd.Function):
    """PyTorch's cross-entropy with its backward pass in the memory of the forward pass.

    The log-probabilities become the gradient.
    PyTorch's own makes two more tensors as large as the logits, and fills one of them with zeros.
    """

    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, labels_n: Tensor, vocab: int) -> Tensor:
        dtype = torch.promote_types(logits_nv.dtype, torch.float32)
        log_p_nv = torch.log_softmax(logits_nv[:, :vocab], dim=-1, dtype=dtype)
        ctx.save_for_backward(log_p_nv, labels_n)
        ctx.like = logits_nv.dtype, logits_nv.shape[1] - vocab
        return -log_p_nv.gather(1, labels_n[:, None]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor, None, None]:
        # Changed in place, so that autograd itself refuses a second backward pass.
        log_p_nv, labels_n = ctx.saved_tensors
        grad_nv = log_p_nv.exp_()
        grad_nv[torch.arange(len(labels_n), device=labels_n.device), labels_n] -= 1.0
        grad_nv.mul_(grad_n[:, None])
        dtype, padding = ctx.like
        grad_nv = grad_nv.to(dtype)
        return F.pad(grad_nv, (0, padding)) if padding else grad_nv, None, None


def cross_entropy(logits_nv: Tensor, labels_n: Tensor, vocab: int) -> Tensor:
    """-log softmax(logits)[label] in nats, [n], in fp32 (fp64 for fp64 logits).

    logits_nv: [n, V]; labels_n: [n] below `vocab`.
    Columns from `vocab` on are padding: they take no part and get no gradient.
    The gradient can be taken once.
    """
    loss: Tensor = _CrossEntropy.apply(logits_nv, labels_n, vocab)  # type: ignore[no-untyped-call]
    return loss
