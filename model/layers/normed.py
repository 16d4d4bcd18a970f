"""The activation of a feed-forward and the norm of its hidden layer in one pass over memory.

Apart the activation's result is written, read by the norm, kept, and read again backward. Here it
is never written. The norm is that of `subln`, before the feed-forward's last matrix. By a kernel of
ours on GPUs; on CPUs they stay apart: a LayerNorm that was compiled with the activation was slower.

Hooks hear what they would hear else: under hooks on the norm, or on the linear layer that it
belongs to, both run apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from model.layers.activated import Activated
from model.layers.cut_norm import CutNorm
from model.layers.torch_parts import LocalMLP, RowLinear
from model.layers.transformer_config import Activation
from model.norms import WIDEST_AFTER_ACTIVATION

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Normed = Callable[[Tensor, "Tensor | None", Activation, bool, Tensor, "Tensor | None", float], Tensor]
"""The activation normed, [.., f].

Of what `torch_parts.activated` takes, and of a gain [f], the offset [f] of a LayerNorm or None, and
an epsilon.
"""


class NormedActivation:
    """Stands in the place of a feed-forward's activation, and feeds the norm after it.

    apart: what computes the activation alone. function: what computes both.
    """

    def __init__(self, linear: RowLinear, norm: CutNorm, apart: Activated, function: Normed) -> None:
        self.norm, self.apart, self.function = norm, apart, function
        self.heard = [
            hooks for part in (linear, norm) for hooks in (part._forward_hooks, part._forward_pre_hooks)
        ]
        self.ready: Tensor | None = None
        """What was given last, normed, until the norm takes it."""

    def __call__(self, inner: Tensor, bias: Tensor | None, function: Activation, gated: bool) -> Tensor:
        """As `torch_parts.activated`, but for the norm, which it has computed already."""
        if any(self.heard):
            return self.apart(inner, bias, function, gated)
        norm = self.norm
        self.ready = self.function(inner, bias, function, gated, norm.weight, norm.bias, norm.eps)
        return self.ready

    def normed(self, x: Tensor) -> Tensor:
        """What the norm gives of x [.., f]: x itself where it is what this gave last."""
        ready, self.ready = self.ready, None
        return x if x is ready else self.norm.apart(x)


def norm_at_once(chunks: Iterable[MegatronModule], function: Normed) -> int:
    """Has activations and the norms after them computed so in training; returns their number.

    function: what computes both. Comes after `activate_at_once`. Apart stay norms whose width
    tensor-parallel ranks share, and wider ones than a program's registers hold.
    """
    found = 0
    for part in (part for chunk in chunks for part in chunk.modules() if isinstance(part, LocalMLP)):
        linear = part.linear_fc2
        norm = linear.input_norm
        if not isinstance(norm, CutNorm) or norm.group.size() > 1 or norm.width > WIDEST_AFTER_ACTIVATION:
            continue
        part.activate = norm.fed = NormedActivation(linear, norm, part.activate, function)
        found += 1
    return found
