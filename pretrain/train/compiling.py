"""`train.compile` and `train.cuda_graph` on the machine at hand: what only it can refuse.

The rest is in `pretrain/config/conflicts.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from model.errors import UserError
from model.layers.compiled import compile_joins, compile_layers
from parallel.hardware.precision import Numerics
from pretrain.config.conflicts import check_streams
from pretrain.config.schema import RunConfig

ATTENTION_BLOCK, CUDNN_MENDED = 128, 91501
"""Sequence lengths that cuDNN's fused attention takes whole are multiples of the first.

The second is the first version (9.15.1) whose captured kernels take others (Transformer Engine's
bound).
"""


def compile_chunks(config: RunConfig, numerics: Numerics, chunks: Sequence[nn.Module]) -> None:
    """Compiles the layers of this rank together.

    Where Transformer Engine has the rest, compiles their joins.

    Raises UserError for joins that compiling would not change, for layers that draw from two random
    streams, and on a CPU without a C++ compiler.
    """
    if numerics.kernels == "local":
        try:
            check_streams(config)
        except ValueError as error:
            raise UserError(str(error)) from None
        compile_layers(chunks)
    elif not compile_joins(chunks):
        raise UserError(
            f"train.compile=true has no effect with model.scheme={config.model.scheme} and Transformer "
            "Engine's kernels, where each residual join is one addition: set train.compile=false"
        )


def check_graphs(seq_length: int) -> None:
    """Checks that this machine can have CUDA graphs of passes over sequences of this length.

    Raises UserError where it cannot.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "train.cuda_graph=true needs a GPU, and this machine has none: set train.cuda_graph=false"
        )
    cudnn = torch.backends.cudnn.version() or 0
    if seq_length % ATTENTION_BLOCK and cudnn < CUDNN_MENDED:
        here = f"{cudnn // 10000}.{cudnn // 100 % 100}"
        raise UserError(
            f"train.cuda_graph=true with data.seq_length={seq_length}, not a multiple of {ATTENTION_BLOCK}: "
            f"cuDNN {here}, as all up to 9.15, may read wrong memory in graphs of its attention: "
            "change the length, install a later one, or set train.cuda_graph=false"
        )
    # Otherwise NCCL would register memory that expandable segments may move.
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if (
            "expandable_segments:True" in os.environ.get(variable, "")
            and os.environ.get("NCCL_GRAPH_REGISTER") != "0"
        ):
            raise UserError(
                f"train.cuda_graph=true with {variable}=expandable_segments:True "
                "needs NCCL_GRAPH_REGISTER=0 in the environment: export it"
            )
