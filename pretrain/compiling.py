"""`train.compile` and `train.cuda_graph`: which runs can have them, refused in one line where the option would fail or do nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from model.compiled import compile_joins, compile_layers
from model.errors import UserError
from parallel.precision import Numerics
from parallel.topology import Layout
from pretrain.config import RunConfig


def compile_chunks(config: RunConfig, numerics: Numerics, chunks: Sequence[nn.Module]) -> None:
    """Compiles the layers of this rank together, or their joins where Transformer Engine has the rest.

    Raises UserError for what does not combine, for joins that compiling would not change, and on a CPU without a C++ compiler.
    """
    check_compile(config, numerics)
    if numerics.kernels == "local":
        compile_layers(chunks)
    elif not compile_joins(chunks):
        raise UserError(
            f"train.compile=true has no effect with model.scheme={config.model.scheme} and Transformer Engine's kernels, where each residual join is one "
            "addition: set train.compile=false"
        )


def check_compile(config: RunConfig, numerics: Numerics) -> None:
    """Raises UserError, naming the first setting that `train.compile=true` does not combine with."""
    parallel = config.parallel
    problems = (
        (parallel.recompute.granularity != "none", f"does not combine with parallel.recompute.granularity={parallel.recompute.granularity}: set it to none"),
        (
            parallel.tensor > 1 and numerics.kernels == "local",
            f"does not combine with parallel.tensor={parallel.tensor}, whose collectives lie inside the layers: set parallel.tensor=1",
        ),
        (parallel.zero == 3, "does not combine with parallel.zero=3, which fetches weights in hooks of the layers: set parallel.zero=1"),
        _dropout(config),
    )
    _refuse("train.compile", problems)


def check_cuda_graph(config: RunConfig, layout: Layout) -> None:
    """Raises UserError, naming the first setting that `train.cuda_graph=true` does not combine with, and on a machine without a GPU."""
    recompute = config.parallel.recompute.granularity
    # Without it, NCCL would register memory that expandable segments may move.
    segments = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") and os.environ.get("NCCL_GRAPH_REGISTER") != "0"
    problems = (
        (not torch.cuda.is_available(), "needs a GPU, and this machine has none: set train.cuda_graph=false"),
        (layout.pipeline > 1, f"does not combine with parallel.pipeline={layout.pipeline}, whose stages wait for each other: set parallel.pipeline=1"),
        (layout.zero == 3, "does not combine with parallel.zero=3, which fetches weights in hooks of the layers: set parallel.zero=1"),
        (recompute != "none", f"has not been shown to compute the same with parallel.recompute.granularity={recompute}: set it to none"),
        _dropout(config),
        (segments, "with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True needs NCCL_GRAPH_REGISTER=0 in the environment too: export it"),
    )
    _refuse("train.cuda_graph", problems)


def _dropout(config: RunConfig) -> tuple[bool, str]:
    model = config.model
    return model.hidden_dropout > 0 or model.attention_dropout > 0, "has no tested dropout: set model.hidden_dropout=0 and model.attention_dropout=0"


def _refuse(option: str, problems: Iterable[tuple[bool, str]]) -> None:
    for wrong, why in problems:
        if wrong:
            raise UserError(f"{option}=true {why}")
