"""Sizes at a layer's two sublayers during one pass, in float64: what forgetting is computed from.

The quantities are those of signal health (`pretrain/train/callbacks/signal/hooks.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from model.depth.folded import FoldedSublayer
from model.layers.layer import DepthLayer
from model.layers.residual import ResidualJoin
from pretrain.train.callbacks.signal.hooks import parts_of

Sums = dict[str, float]


def mean_square(x: Tensor) -> float:
    """Mean of squares."""
    return float(x.detach().double().square().mean())


def common_share(x_sbh: Tensor) -> float:
    """The part of a stream's power that all its tokens have in common; 0 for a stream of zeros.

    x: [s, b, h], or [tokens, h].
    """
    x = x_sbh.detach().double().flatten(0, -2)
    power = float(x.square().mean())
    return float(x.mean(0).square().mean()) / power if power else 0.0


def watch(layer: DepthLayer, sums: Sums, of: Callable[[Tensor], Tensor]) -> list[Any]:
    """Hooks that fill `sums` with the mean squares of `hooks.SUBLAYER_MEANS`; returns handles.

    of: the part of a stream [s, b, h] that counts.
    """
    handles: list[Any] = []
    for part, module in parts_of(layer):
        plan: FoldedSublayer = getattr(layer.plan, part)
        join: ResidualJoin = getattr(layer, f"{module}_join")
        handles.append(join.register_forward_hook(_joined(part, plan, sums, of)))
        if plan.norm_out:
            norm: nn.Module = getattr(layer, f"{module}_output_norm")
            handles.append(norm.register_forward_hook(_normed(part, sums, of)))
    return handles


def _joined(
    part: str, plan: FoldedSublayer, sums: Sums, of: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    def hook(join: ResidualJoin, args: tuple[Any, ...], output: Tensor) -> None:
        branch, factor, kept = join.terms(*args)
        sums[f"{part}_branch"] = mean_square(of(branch)) * float(factor) ** 2
        sums[f"{part}_residual"] = mean_square(of(kept))
        sums[f"{part}_sum"] = mean_square(of(output))
        if plan.residual_from_norm:
            sums[f"{part}_entered"] = mean_square(of(args[0]))

    return hook


def _normed(part: str, sums: Sums, of: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        sums[f"{part}_left"] = mean_square(of(output))

    return hook
