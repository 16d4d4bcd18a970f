"""What hooks on layers measure during one step.

Sizes of the stream and of the branches, the late gradient, the largest attention logit.
Hooks exist only while a step is measured, so that other steps pay nothing.
Values stay on the device until the step is over.
Layers compute in units of their own (`model/depth/folded.py`).
What is kept here is the stream of the scheme's equation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.depth.folded import FoldedSublayer
from model.layers.context import gathered_pieces, places
from model.layers.layer import DepthLayer
from model.layers.residual import ResidualJoin
from pretrain.train.callbacks.signal import streams

PARTS = (("attention", "self_attention"), ("cross", "cross_attention"), ("mlp", "mlp"))
"""Sublayers: name in the plan, and what a layer's modules of it begin with."""
# Mean squares of a sublayer: the branch; what it is added to; their sum; what Norm_in gives where
# the residual is taken from it; what Norm_out gives.
SUBLAYER_MEANS = ("branch", "residual", "sum", "entered", "left")
MEANS = (
    *(f"{part}_{key}" for part, _ in PARTS for key in SUBLAYER_MEANS),
    "stream_square",
    "forward_variance",
    "grad_variance_late",
)
"""Sums over micro-batches that become means."""
CHEAP = "stream_square"


def parts_of(layer: DepthLayer) -> tuple[tuple[str, str], ...]:
    """Those of `PARTS` that a layer has."""
    return tuple(part for part in PARTS if part[0] != "cross" or layer.has_cross)


# Scores of one sample are made in pieces of at most this many numbers.
PIECE = 1 << 24


def mean_square(x: Tensor) -> Tensor:
    """Mean of squares in float32, a scalar on the tensor's device."""
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32).square() / x.numel()


def largest_logit(query: Tensor, key: Tensor, places: Tensor | None = None) -> Tensor:
    """Largest scaled attention score of the first sample under a causal mask, over all heads.

    The score of its size that softmax sees, as large logits are what makes attention collapse.

    query: [s, b, heads, d].
    key: [t, b, groups, d].
    places: of the queries among the keys, rising, [s] on the host; without them 0 .. s - 1.
    Returns a scalar.
    """
    q, k = query.detach()[:, 0].float(), key.detach()[:, 0].float()
    length, heads, width = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    places = torch.arange(length) if places is None else places
    rows = max(1, PIECE // (len(k) * heads))
    best = torch.full((), -math.inf, device=q.device)
    for start in range(0, length, rows):
        own = places[start : start + rows]
        seen = int(own[-1]) + 1
        piece = torch.einsum("ihd,jhd->hij", q[start : start + rows], k[:seen])
        later = torch.arange(seen, device=q.device) > own.to(q.device)[:, None]
        best = torch.maximum(best, piece.masked_fill(later, -math.inf).max())
    return best / math.sqrt(width)


class LayerHooks:
    """Hooks on some layers and what they have seen, by global layer number from 1."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, Tensor]] = {}
        self.logits: dict[int, Tensor] = {}
        self.vectors: dict[int, Tensor] = {}
        """Sum over micro-batches of the mean over tokens of the stream after a layer, [h]."""
        self.handles: list[Any] = []

    def remove(self) -> None:
        """Takes the hooks away; what they saw stays."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _add(self, number: int, key: str, value: Tensor) -> None:
        sums = self.sums.setdefault(number, {})
        sums[key] = sums[key] + value if key in sums else value

    def watch_stream(self, layer: DepthLayer) -> None:
        """The cheap set: the size of the stream after the layer."""
        number, square = layer.layer_number, layer.plan.leaving**2

        def left(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
            # Recomputation runs the forward pass twice, the first time without gradients.
            if torch.is_grad_enabled():
                self._add(number, CHEAP, mean_square(streams.leaving(layer, output)) * square)

        self.handles.append(layer.register_forward_hook(left))

    def watch(self, layer: DepthLayer, late: bool) -> None:
        """The full set.

        late: whether the second half of the stream's first dimension is the second half of the
        sequence.
        """
        number, before, after = layer.layer_number, layer.plan.entering**2, layer.plan.leaving**2
        self.watch_stream(layer)

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream, rows = streams.entering(layer, args, kwargs)
            if not late or not torch.is_grad_enabled() or not stream.requires_grad:
                return

            def on_gradient(gradient: Tensor) -> None:
                own = gradient[rows]
                self._add(number, "grad_variance_late", mean_square(own[len(own) // 2 :]) / before)

            stream.register_hook(on_gradient)

        def left(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
            if torch.is_grad_enabled():
                stream = streams.leaving(layer, output).detach().float()
                self._add(number, "forward_variance", stream.var() * after)
                mean = stream.mean((0, 1)) * layer.plan.leaving
                self.vectors[number] = self.vectors[number] + mean if number in self.vectors else mean

        self.handles += [
            layer.register_forward_pre_hook(entering, with_kwargs=True),
            layer.register_forward_hook(left),
        ]
        for part, module in parts_of(layer):
            plan: FoldedSublayer = getattr(layer.plan, part)
            join: ResidualJoin = getattr(layer, f"{module}_join")
            self.handles.append(join.register_forward_hook(self._joined(number, part, plan)))
            if plan.norm_out:
                norm: nn.Module = getattr(layer, f"{module}_output_norm")
                self.handles.append(norm.register_forward_hook(self._normed(number, part)))
        core = getattr(layer.self_attention, "core_attention", None)
        if core is not None:
            group = layer.self_attention.pg_collection.cp
            self.handles.append(core.register_forward_pre_hook(self._attending(number, group)))

    def _joined(self, number: int, part: str, plan: FoldedSublayer) -> Callable[..., None]:
        def hook(join: ResidualJoin, args: tuple[Any, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            # Only their ratios are shown: all are in the units of the sum.
            branch, factor, kept = join.terms(*args)
            self._add(number, f"{part}_branch", mean_square(branch) * factor**2)
            self._add(number, f"{part}_residual", mean_square(kept))
            self._add(number, f"{part}_sum", mean_square(output))
            if plan.residual_from_norm:
                self._add(number, f"{part}_entered", mean_square(args[0]))

        return hook

    def _normed(self, number: int, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                self._add(number, f"{part}_left", mean_square(output))

        return hook

    def _attending(self, number: int, group: dist.ProcessGroup) -> Callable[..., None]:
        rank, ranks = group.rank(), group.size()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # One micro-batch is enough for a maximum that is followed over steps.
            if number in self.logits or len(args) < 2:
                return
            query, key = args[0], args[1]
            if ranks == 1:
                self.logits[number] = largest_logit(query, key)
                return
            # Here every rank is: all watch the same steps.
            own_bgsd = key.detach()[:, :1].permute(1, 2, 0, 3)
            whole_bgtd, _ = gathered_pieces(own_bgsd, own_bgsd, group)
            at = places(len(query) * ranks, rank, ranks)
            self.logits[number] = largest_logit(query, whole_bgtd.permute(2, 0, 1, 3), at)

        return hook
