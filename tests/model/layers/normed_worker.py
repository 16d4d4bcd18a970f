"""Activations with the norms after them by Triton's interpreter, against PyTorch in fp64.

Also run on a GPU: `tests/gpu/test_gpu_joins.py`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from model.layers.normed_pass import normed_pass
from model.layers.torch_parts import activated, norm_by_parts
from model.layers.transformer_config import Activation
from tests.model.layers.activation_worker import FORMATS, FUNCTIONS, ROWS, WIDTHS

EPSILON = 2.0**-8


def normed(
    inner: Tensor,
    bias: Tensor | None,
    function: Activation,
    gated: bool,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
) -> Tensor:
    """What both are, by PyTorch."""
    return norm_by_parts(activated(inner, bias, function, gated), weight, shift, eps)


def results_and_gradients(
    kind: str,
    dtype: torch.dtype,
    width: int,
    terms: str,
    device: str = "cpu",
    rows: tuple[int, ...] = ROWS,
) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels and PyTorch in fp64 give: the result, then every gradient.

    terms: words among gated, biased and centred.
    """
    torch.manual_seed(width)
    gated = "gated" in terms
    size = width * (1 + gated)
    x = (3 * torch.randn(*rows, size, dtype=torch.float64)).to(device, dtype)
    # As large as where an exponential overflows, but not all of a row's size.
    x[0, 0, :3] = torch.tensor([-200.0, 0.0, -20.0], dtype=dtype)
    given: list[Tensor | None] = [x.requires_grad_()]
    for length, there in ((size, "biased" in terms), (width, True), (width, "centred" in terms)):
        vector = torch.randn(length, dtype=torch.float64).to(device, dtype)
        given.append(vector.requires_grad_() if there else None)
    leaves = [None if one is None else one.detach().double().requires_grad_() for one in given]
    results = []
    for function, (inner, bias, weight, shift) in ((normed_pass, given), (normed, leaves)):
        assert inner is not None
        assert weight is not None
        results.append(function(inner, bias, FUNCTIONS[kind], gated, weight, shift, EPSILON))
    weights = torch.randn_like(results[0])
    results[0].backward(weights)
    results[1].backward(weights.double())
    ours, theirs = (
        [made.detach(), *(one.grad for one in side if one is not None and one.grad is not None)]
        for made, side in zip(results, (given, leaves), strict=True)
    )
    assert len(ours) == len(theirs) == 1 + sum(one is not None for one in given)
    return ours, theirs


def cases() -> list[tuple[str, str, str, int]]:
    """(format, kind, terms, width): every kind with every set of terms in fp64, and in another."""
    words = ("gated", "biased", "centred")
    sets = [" ".join(itertools.compress(words, chosen)) for chosen in itertools.product((0, 1), repeat=3)]
    found = [("fp64", "gelu", sets[-1], 2500)]  # a row for each tile, and one program
    for place, (kind, terms) in enumerate(itertools.product(FUNCTIONS, sets)):
        width = WIDTHS[place % len(WIDTHS)]
        other = ("fp32", "bf16")[(place + place // len(sets)) % 2]
        found += [(label, kind, terms, width) for label in ("fp64", other)]
    return found


def errors() -> dict[str, float]:
    """Of every case, the largest by the largest element of its tensor."""
    from tests.model.layers.join_worker import error

    return {
        f"{label} {kind} {terms}, {width}": error(*results_and_gradients(kind, FORMATS[label], width, terms))
        for label, kind, terms, width in cases()
    }
