"""Kinds of norms: one table.

Configuration, layers, parameters, costs, reference and exports read it.
A new kind is one entry here, its kernel in `model/layers/torch_parts.py` and,
for exports by remote code, in `model/hf/remote/modeling_fathom.py`.
`tests/model/test_norms.py` fails until all three agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NormKind:
    """What a norm over the hidden dimension computes, has and keeps."""

    core: str
    """Megatron-core's, Transformer Engine's and people's name."""
    centred: bool
    """It takes the mean away; then it has a bias too."""
    statistics: int
    """fp32 numbers kept for the backward pass, per position."""
    keeps_normed: bool
    """PyTorch's own keeps the normed input for the backward pass beside the input.

    It is not one kernel.
    """

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of its parameters, each [h]."""
        return ("weight", "bias") if self.centred else ("weight",)

    def of(self, x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """The definition: x [..., h] normed over h, in the format of x.

        bias: [h] where it is centred.
        """
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain
        return normed if bias is None else normed + bias


NORMS = {
    "layernorm": NormKind("LayerNorm", centred=True, statistics=2, keeps_normed=False),
    "rmsnorm": NormKind("RMSNorm", centred=False, statistics=1, keeps_normed=True),
}

WIDEST_AFTER_ACTIVATION = 8192
"""Numbers in a row that a kernel of ours norms together with the activation before it.

Backward its registers hold no more (`model/layers/normed_kernel.py`).
"""
