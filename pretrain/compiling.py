"""`train.compile`: which runs can have their layers compiled, refused in one line where the option would fail or do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from model.compiled import compile_layers
from model.errors import UserError
from parallel.precision import Numerics
from pretrain.config import RunConfig


def compile_chunks(config: RunConfig, numerics: Numerics, chunks: Sequence[nn.Module]) -> None:
    """Compiles the layers of this rank together. Raises UserError for what does not combine, and on a CPU without a C++ compiler."""
    check_compile(config, numerics)
    compile_layers(chunks)


def check_compile(config: RunConfig, numerics: Numerics) -> None:
    """Raises UserError, naming the first setting that `train.compile=true` does not combine with."""
    parallel, model = config.parallel, config.model
    problems = (
        (numerics.kernels == "te", "is for PyTorch's kernels, and this run has Transformer Engine's: set train.kernels=local or train.compile=false"),
        (parallel.recompute.granularity != "none", f"does not combine with parallel.recompute.granularity={parallel.recompute.granularity}: set it to none"),
        (parallel.tensor > 1, f"does not combine with parallel.tensor={parallel.tensor}, whose collectives lie inside the layers: set parallel.tensor=1"),
        (parallel.zero == 3, "does not combine with parallel.zero=3, which fetches weights in hooks of the layers: set parallel.zero=1"),
        (model.hidden_dropout > 0 or model.attention_dropout > 0, "has no tested dropout: set model.hidden_dropout=0 and model.attention_dropout=0"),
    )
    for wrong, why in problems:
        if wrong:
            raise UserError(f"train.compile=true {why}")
