"""Queries, keys and values taken out of their product by Triton's interpreter, against fp64.

Also run on a GPU: `tests/gpu/test_gpu_joins.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.heads_pass import separate_pass
from model.layers.torch_parts import Heads
from tests.model.layers.activation_worker import FORMATS
from tests.reference.heads import heads_of

S, B = 5, 3
"""Positions and samples, which no tile divides."""
CASES = {
    "a key for every query": (Heads(5, 1, 12), None, True),
    "groups": (Heads(3, 2, 10), None, True),
    "one group": (Heads(1, 3, 8), None, True),
    "turned": (Heads(5, 1, 12), 12, True),
    "turned, groups, no bias": (Heads(3, 2, 10), 10, False),
    "a part of a head turns": (Heads(2, 3, 64), 16, True),
    "turned by sample": (Heads(2, 2, 8), -8, True),
}
"""Heads, entries that turn (negative: by angles of each sample), and whether there is a bias."""


def results_and_gradients(
    name: str, dtype: torch.dtype, device: str = "cpu", positions: int = S
) -> tuple[list[Tensor], list[Tensor]]:
    """What kernels and reference give: queries, keys, values, then gradients of input and bias."""
    torch.manual_seed(3)
    heads, turning, biased = CASES[name]
    columns = heads.groups * (heads.share + 2) * heads.width
    x = torch.randn(positions, B, 11, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(columns, 11, dtype=torch.float64).to(device, dtype)
    bias = torch.randn(columns, dtype=torch.float64).to(device, dtype).requires_grad_() if biased else None
    table = None
    if turning is not None:
        samples = B if turning < 0 else 1
        table = torch.randn(positions, samples, 1, 2 * abs(turning), dtype=torch.float64).to(device, dtype)
    lent = None if bias is None else bias.detach()
    product = F.linear(x, weight, lent)
    product.retain_grad()
    ours = separate_pass(product, bias, table, heads)
    # Attention's gradients lie by head, by position, and in pieces.
    weights = [torch.randn_like(one) for one in ours]
    weights[0] = weights[0].transpose(0, 2).contiguous().transpose(0, 2)
    weights[1] = torch.cat((weights[1], weights[1]), dim=-1)[..., : heads.width]
    torch.autograd.backward(ours, weights)
    exact = product.detach().double().requires_grad_()
    theirs = heads_of(exact, None if table is None else table.double(), *heads)
    torch.autograd.backward(theirs, [one.double() for one in weights])
    assert exact.grad is not None
    assert product.grad is not None
    grads = [[product.grad], [exact.grad]]
    if bias is not None:
        assert bias.grad is not None
        grads = [[product.grad, bias.grad], [exact.grad, exact.grad.sum((0, 1))]]
    return [one.detach() for one in ours] + grads[0], [one.detach() for one in theirs] + grads[1]


def errors() -> dict[str, float]:
    """Of every case in every format, the largest by the largest element of its tensor."""
    from tests.model.layers.join_worker import error

    return {
        f"{label} {name}": error(*results_and_gradients(name, dtype))
        for name in CASES
        for label, dtype in FORMATS.items()
    }
