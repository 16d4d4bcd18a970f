"""Biases with activations by Triton's interpreter, against PyTorch in fp64.

Also run on a GPU: `tests/gpu/test_gpu_joins.py`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from model.layers.activation_pass import KERNELS, activation_pass

FORMATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, WIDTHS = (5, 7), (40, 257, 300)
"""Rows that no tile divides, and widths."""
FUNCTIONS = {name: function for function, name in KERNELS.items()}


def results_and_gradients(
    kind: str,
    dtype: torch.dtype,
    width: int,
    *,
    gated: bool,
    biased: bool,
    device: str = "cpu",
    rows: tuple[int, ...] = ROWS,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels and PyTorch in fp64 give: the result, then gradients of input and bias."""
    torch.manual_seed(width)
    function, size = FUNCTIONS[kind], width * (1 + gated)
    # With numbers as large as where an exponential overflows.
    x = (3 * torch.randn(*rows, size, dtype=torch.float64)).to(device, dtype)
    x[0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -20.0], dtype=dtype)
    bias = torch.randn(size, dtype=torch.float64).to(device, dtype)
    given = [x.requires_grad_(), bias.requires_grad_()] if biased else [x.requires_grad_()]
    ours = activation_pass(x, bias if biased else None, function, gated)
    weights = torch.randn_like(ours)
    ours.backward(weights)
    leaves = [one.detach().double().requires_grad_() for one in given]
    inner = sum(leaves, torch.zeros((), dtype=torch.float64, device=device))
    gate, up = inner.split(width, dim=-1) if gated else (inner, torch.ones_like(inner))
    theirs = function(gate) * up
    theirs.backward(weights.double())
    grads = [[one.grad for one in side if one.grad is not None] for side in (given, leaves)]
    assert len(grads[0]) == len(grads[1]) == 1 + biased
    return [ours.detach(), *grads[0]], [theirs.detach(), *grads[1]]


def cases() -> list[tuple[str, str, bool, bool, int]]:
    """(kind, format, gate, bias, width): every pair of a kind and a format."""
    found = []
    for number, (kind, label) in enumerate(itertools.product(FUNCTIONS, FORMATS)):
        gated, biased = bool(number % 2), bool(number // 2 % 2) or label == "fp64"
        found.append((kind, label, gated, biased, WIDTHS[number % len(WIDTHS)]))
    return found


def errors() -> dict[str, float]:
    """Of every case, the largest by the largest element of its tensor."""
    from tests.model.layers.join_worker import error

    found = {}
    for kind, label, gated, biased, width in cases():
        name = f"{label} {kind}{' gated' * gated}{' biased' * biased}"
        found[name] = error(*results_and_gradients(kind, FORMATS[label], width, gated=gated, biased=biased))
    return found
