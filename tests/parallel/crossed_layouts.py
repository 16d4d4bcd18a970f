"""The parallel layouts of encoder-decoders that are compared with one process.

The table of `tests/parallel/layouts.py`, for models whose layers are of two kinds and whose stages
send each other two streams. Rows have other numbers of labels, so that ranks do.
"""

from __future__ import annotations

from typing import Any

from model.depth.schemes import SCHEMES
from tests.parallel.layouts import (
    BF16,
    FULL,
    MUON,
    OFFLOAD,
    PP,
    SELECTIVE,
    SP,
    THREE,
    TP,
    UNCLIPPED,
    UNTIED,
    VP,
    WIDE,
    Case,
)
from tests.parallel.training import SEQ2SEQ, given

# Of eight layers the first three are the encoder's.
ALONE, ENCODER, LONG = (given(pipeline=2, pipeline_split=split) for split in ([3, 5], [2, 6], [5, 3]))
FOUR = given(pipeline=4, pipeline_split=[1, 2, 2, 3])
CROSSED_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if not scheme.no_cross)
SMOOTH = given(label_smoothing=0.1)
TWO_TABLES = given(share_embeddings=False)
LEARNED = given(scheme="deepscalelm_post_ln")
POST = LEARNED | given(position="sinusoidal", logit_bias=True)
# Encoder and decoder share nothing but the width.
APART = POST | TWO_TABLES | given(activation="relu", embedding_norm=True)
LLAMA = given(
    position="rotary",
    activation="swiglu",
    normalization="rmsnorm",
    bias=False,
    tie_embeddings=False,
    encoder_attention_heads=2,
    encoder_ffn_hidden_size=48,
    head_dim=8,
)


def crossed(
    name: str,
    world: int,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """A case of the small encoder-decoder with changes."""
    return Case(name, world, parallel or {}, SEQ2SEQ | (model or {}), **more)


def _one() -> list[Case]:
    grouped = given(recompute=given(granularity="full", num_layers=2))
    return [
        crossed(
            "8 micro-batches of 1 against 1 of 8",
            1,
            train=given(micro_batch_size=1),
            reference_train=given(micro_batch_size=8),
        ),
        crossed("full recompute", 1, FULL, exact=True),
        crossed("full recompute, groups of 2", 1, grouped, exact=True),
        crossed("selective recompute", 1, SELECTIVE, exact=True),
        crossed("ZeRO-3", 1, THREE),
    ]


def _two() -> list[Case]:
    return [
        crossed("TP2", 2, TP),
        crossed("TP2 + SP", 2, SP),
        crossed("TP2 + SP, rotary SwiGLU RMSNorm", 2, SP, LLAMA),
        crossed("TP2 + SP, post-LN, smoothed labels", 2, SP, POST, train=SMOOTH),
        crossed("PP2", 2, PP),
        crossed("PP2, layers 3 + 5", 2, ALONE),
        crossed("PP2, layers 2 + 6", 2, ENCODER),
        crossed("PP2 interleaved, VP2", 2, VP),
        crossed("PP2, untied, unclipped", 2, PP, UNTIED, optimizer=UNCLIPPED, exact=True),
        crossed("PP2, two tables", 2, PP, TWO_TABLES),
        crossed("PP2, post-LN, learned positions, smoothed labels", 2, PP, LEARNED, train=SMOOTH),
        *[crossed(f"DP2, ZeRO-{stage}", 2, given(zero=stage)) for stage in (0, 1, 2)],
        crossed("TP2 + SP, Muon", 2, SP, optimizer=MUON),
        # Last, as in `tests/parallel/layouts.py`.
        crossed("DP2, ZeRO-3", 2, THREE),
        crossed("DP2, ZeRO-3, two tables", 2, THREE, TWO_TABLES),
    ]


def _combined() -> list[Case]:
    both, smooth = SP | given(pipeline=2), given(train=SMOOTH)
    unclipped = given(optimizer=UNCLIPPED, exact=True)
    return [
        crossed("TP2 + SP, apart, selective recompute", 2, SP | SELECTIVE, APART, **smooth),
        crossed("TP2 + SP, rotary SwiGLU RMSNorm, full recompute", 2, SP | FULL, LLAMA),
        crossed("PP2, layers 3 + 5, apart", 2, ALONE, APART, **smooth),
        crossed("PP2, layers 2 + 6, selective recompute", 2, ENCODER | SELECTIVE),
        crossed("PP2, layers 5 + 3, rotary SwiGLU RMSNorm, full recompute", 2, LONG | FULL, LLAMA),
        crossed("PP2 interleaved, full recompute", 2, VP | FULL),
        crossed("PP2 interleaved, untied, unclipped", 2, VP, LLAMA, **unclipped),
        crossed("TP2 + SP, bf16, fp32 residual", 2, SP, train=WIDE),
        crossed("PP2, bf16", 2, PP, train=BF16),
        *[crossed(f"TP2 + SP, {scheme}", 2, SP, given(scheme=scheme)) for scheme in CROSSED_SCHEMES],
        crossed("DP2, ZeRO-3, apart, full recompute", 2, THREE | FULL, APART, **smooth),
        crossed("DP2, ZeRO-2, offload", 2, OFFLOAD | given(zero=2)),
        crossed("TP2 x PP2 + SP, full recompute", 4, both | FULL),
        crossed(
            "TP2 x PP2 interleaved + SP, rotary SwiGLU RMSNorm", 4, both | given(virtual_stages=2), LLAMA
        ),
        crossed("PP2, layers 3 + 5, x DP2, ZeRO-2, apart", 4, ALONE | given(zero=2), APART, **smooth),
        crossed("PP4, layers 1 + 2 + 2 + 3, rotary SwiGLU RMSNorm", 4, FOUR, LLAMA),
        crossed("TP4 + SP", 4, given(tensor=4, sequence_parallel=True)),
        crossed("DP4, ZeRO-2", 4, given(zero=2)),
        crossed("TP2 x PP2 + SP, bf16", 4, both, train=BF16),
        crossed("TP2 x DP2 + SP, ZeRO-3, apart", 4, SP | THREE, APART),
        crossed("TP2 x PP2 x DP2 + SP, ZeRO-2, apart", 8, both | given(zero=2), APART),
        crossed("TP2 x PP4 interleaved + SP", 8, SP | given(pipeline=4, virtual_stages=2)),
    ]


CROSSED: dict[int, list[Case]] = {1: _one(), 2: _two()}
"""What docs/measured/layouts.md shows, and every run of the tests measures but for what follows."""
HELD_BY = {
    "full recompute": "full recompute, groups of 2",
    "TP2 + SP": "TP2 + SP, Muon",
    "PP2": "PP2, post-LN, learned positions, smoothed labels",
    "DP2, ZeRO-1": "DP2, ZeRO-2",
    "DP2, ZeRO-3, two tables": "DP2, ZeRO-3",
}
"""Cases that are left to the slow tests -> cases with all their parts."""
COMBINED: list[Case] = _combined()
"""Combinations of these, and more processes, for the slow tests."""
