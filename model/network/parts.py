"""Which parts the layers are made of, and how their weights are cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from model.depth.folded import FoldedLayer
from model.layers.torch_parts import Norm
from model.layers.torch_spec import local_layer_spec

Kernels = Literal["local", "te", "te_apart"]
"""Parts of the layers: PyTorch's; Transformer Engine's; those, with norms apart from the products.

In the last, norms of the stream are PyTorch's, so that `model/layers/joined.py` can have them.
"""


def kernel_parts(
    kernels: Kernels, fp32_stream: bool = False, *, causal: bool = True, soft_cap: float | None = None
) -> tuple[Callable[[FoldedLayer], ModuleSpec], type]:
    """The layer specification and the norm around the stack of a set of kernels.

    fp32_stream: the stream is in fp32 and the weights are not. causal: mask of the self-attention.
    soft_cap: of its scores.
    Raises ImportError for Transformer Engine's where Transformer Engine is not installed.
    """
    given: dict[str, Any] = {"causal": causal, "fp32_stream": fp32_stream, "soft_cap": soft_cap}
    if kernels == "local":
        return partial(local_layer_spec, **given), Norm
    from model.layers.te_spec import TENorm, te_layer_spec

    apart = kernels == "te_apart"
    return partial(te_layer_spec, apart=apart, **given), Norm if fp32_stream or apart else TENorm


def mark_tensor_parallel(module: nn.Module) -> None:
    """Sets the attributes that say how weights are cut over tensor-parallel ranks.

    Megatron-core sets them only where it draws the values itself.
    """
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(part, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(weight, True, 0, 1)
        elif isinstance(part, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, True, 1, 1)
