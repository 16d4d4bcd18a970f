"""Feed-forwards with activations inside of products by Triton's interpreter, against fp64.

Also run on a GPU: `tests/gpu/test_gpu_products.py`.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.activated import Feed
from model.layers.product_pass import feed_pass
from model.layers.torch_parts import activated
from model.layers.transformer_config import Activation
from tests.model.layers.activation_worker import FORMATS, FUNCTIONS

ROWS = (15, 7)
"""Rows that no tile divides."""
WIDTHS = ((40, 75), (19, 50), (33, 17))
"""Widths before and inside: of many tiles and of none."""


def by_parts(x: Tensor, first: Any, second: Any, function: Activation, gated: bool) -> Tensor:
    """By PyTorch's operators."""
    inner = F.linear(x, first.weight, first.bias)
    return F.linear(activated(inner, None, function, gated), second.weight, second.bias)


def _linear(weight: Tensor, bias: Tensor | None, *, leaves_bias: bool = False) -> Any:
    return SimpleNamespace(
        weight=weight,
        bias=bias,
        leaves_bias=leaves_bias,
        fuse_wgrad_accumulation=hasattr(weight, "main_grad"),
    )


def results_and_gradients(
    kind: str,
    dtype: torch.dtype,
    widths: tuple[int, int],
    *,
    gated: bool,
    biased: bool,
    feed: Feed = feed_pass,
    device: str = "cpu",
    rows: tuple[int, ...] = ROWS,
) -> tuple[list[Tensor], list[Tensor]]:
    """What `feed` and PyTorch in fp64 give.

    The result, then gradients of input, first weight, its bias, second weight, its bias.
    """
    h, f = widths
    torch.manual_seed(h)
    shapes = ((*rows, h), (f * (1 + gated), h), (f * (1 + gated),), (h, f), (h,))
    scales = (1.0, 3 / h**0.5, 1.0, f**-0.5, 1.0)
    given = [
        (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    x, first, bias, second, last = given
    used = (bias, last) if biased else (None, None)
    ours = feed(x, _linear(first, used[0]), _linear(second, used[1]), FUNCTIONS[kind], gated)
    weights = torch.randn_like(ours)
    ours.backward(weights)
    leaves = [one.detach().double().requires_grad_() for one in given]
    x, first, bias, second, last = leaves
    used = (bias, last) if biased else (None, None)
    theirs = by_parts(x, _linear(first, used[0]), _linear(second, used[1]), FUNCTIONS[kind], gated)
    theirs.backward(weights.double())
    grads = [[one.grad for one in side if one.grad is not None] for side in (given, leaves)]
    assert len(grads[0]) == len(grads[1]) == 3 + 2 * biased
    return [ours.detach(), *grads[0]], [theirs.detach(), *grads[1]]


def cases() -> list[tuple[str, str, bool, bool, tuple[int, int]]]:
    """(kind, format, gate, bias, widths): every pair of a kind and a format."""
    found = []
    for number, (kind, label) in enumerate(itertools.product(FUNCTIONS, FORMATS)):
        gated, biased = bool(number % 2), bool(number // 2 % 2) or label == "fp64"
        found.append((kind, label, gated, biased, WIDTHS[number // 3 % len(WIDTHS)]))
    return found


def errors() -> dict[str, dict[str, float]]:
    """Of every case, the largest by the largest element of its tensor: ours, and by parts."""
    from tests.model.layers.join_worker import error

    found = {}
    for kind, label, gated, biased, widths in cases():
        name = f"{label} {kind}{' gated' * gated}{' biased' * biased}"
        found[name] = {
            way: error(
                *results_and_gradients(kind, FORMATS[label], widths, gated=gated, biased=biased, feed=feed)
            )
            for way, feed in (("ours", feed_pass), ("parts", by_parts))
        }
    return found
