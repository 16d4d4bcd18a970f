"""torch.compile for the layers of a stack: one compilation that all layers share.

Each layer is compiled as a function of its inputs and weights, so that a thousand layers cost one compilation. What differs between layers would cost one
each: numbers are handed over as scalars of tensors where a scheme varies them with depth, and a scheme with two kinds of layers compiles twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import UserError
from model.layer import DepthLayer

COMPILERS = ("g++", "clang++", "c++")


def _forward(layer: DepthLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return layer.forward(*args, **kwargs)


def compile_layers(chunks: Iterable[nn.Module], *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles the layers of these model chunks together; returns their number. They run compiled in training steps and as they were in evaluation and
    under hooks, which a compiled layer would not call.

    backend: torch.compile's. Raises UserError on a CPU without a C++ compiler.
    """
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, DepthLayer)]
    if backend == "inductor" and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
        raise UserError("train.compile=true needs a C++ compiler on a machine without GPUs: install g++ (apt-get install g++) or set train.compile=false")
    shared = torch.compile(_forward, fullgraph=True, dynamic=False, backend=backend)
    varying = {layer.plan.attention.input_scale for layer in layers} | {layer.plan.mlp.input_scale for layer in layers}
    for layer in layers:
        layer.compiled = shared
        if len(varying) > 1:
            layer.scales_as_tensors()
    return len(layers)
