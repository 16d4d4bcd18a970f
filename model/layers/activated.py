"""The activation of a feed-forward with the bias before it and its gate in one pass over memory.

Apart it is one pass, and with a gate two or three; a second pass backward sums the gradient of the
bias, which comes out of the same pass here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.layers.torch_parts import LocalMLP, activated
from model.layers.transformer_config import Activation

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

Activated = Callable[[Tensor, "Tensor | None", Activation, bool], Tensor]
"""Takes and gives what `model.layers.torch_parts.activated` does."""


def _by_triton() -> Activated:
    from model.layers.activation_pass import activation_pass

    return activation_pass


def _by_compiler() -> Activated:
    return torch.compile(activated, fullgraph=True, dynamic=False)


MAKERS: dict[str, Callable[[], Activated]] = {"triton": _by_triton, "compile": _by_compiler}
"""What computes it in one pass: as those of `model.layers.joined`, by the same names."""


def activate_at_once(chunks: Iterable[MegatronModule], by: str) -> int:
    """Has feed-forwards of PyTorch's parts computed so in training; returns their number.

    by: one of `MAKERS`. Their first products leave their biases to it.
    """
    parts = [part for chunk in chunks for part in chunk.modules() if isinstance(part, LocalMLP)]
    function = MAKERS[by]()
    for part in parts:
        part.activate = function
        part.linear_fc1.leaves_bias = True
    return len(parts)
