"""Layouts that cut sequences over context-parallel ranks, compared with one process."""

from __future__ import annotations

from model.depth.schemes import scheme_names
from tests.parallel.layouts import (
    BF16,
    DOCUMENTS,
    FULL,
    GROWING,
    LLAMA,
    LOCAL,
    MUON,
    OFFLOAD,
    PP,
    SELECTIVE,
    SP,
    THREE,
    UNTIED,
    VP,
    WIDE,
    Case,
)
from tests.parallel.training import given

CP, FOUR = given(context=2), given(context=4)
CAPPED = LLAMA | given(attention=given(qk_norm=True, soft_cap=2.0, qkv_bias=True), logit_soft_cap=4.0)
LOSSES = given(z_loss=0.01, label_smoothing=0.1)


def _two() -> list[Case]:
    cases = [
        Case("CP2", 2, CP),
        Case("CP2, GQA rotary SwiGLU RMSNorm", 2, CP, LLAMA),
        Case("CP2, one group", 2, CP, given(num_query_groups=1)),
        Case("CP2, no positions", 2, CP, given(position="none")),
        Case("CP2, windows", 2, CP, LOCAL),
        Case("CP2, soft caps, z-loss, smoothed labels", 2, CP, CAPPED, LOSSES),
        Case("CP2, documents", 2, CP, data=DOCUMENTS),
        Case(
            "CP2, documents, GQA rotary SwiGLU RMSNorm, selective recompute",
            2,
            CP | SELECTIVE,
            LLAMA,
            data=DOCUMENTS,
        ),
        Case(
            "CP2, documents, windows, growing batches and sequences",
            2,
            CP,
            LOCAL,
            schedule=GROWING,
            data=DOCUMENTS,
        ),
        Case("CP2, documents, soft caps", 2, CP, CAPPED, data=DOCUMENTS),
        Case("CP2, full recompute", 2, CP | FULL),
        Case("CP2, selective recompute", 2, CP | SELECTIVE, LLAMA),
        Case("CP2, untied", 2, CP, UNTIED),
        Case("CP2, ZeRO-0", 2, CP | given(zero=0)),
        Case("CP2, ZeRO-2", 2, CP | given(zero=2)),
        Case("CP2, offload", 2, CP | OFFLOAD),
        Case("CP2, Muon", 2, CP, optimizer=MUON),
        Case("CP2, bf16", 2, CP, train=BF16),
        Case("CP2, bf16, fp32 residual", 2, CP, LLAMA, WIDE),
    ]
    cases += [Case(f"CP2, {scheme}", 2, CP, given(scheme=scheme)) for scheme in scheme_names()]
    # Last, as in `tests/parallel/layouts.py`.
    return [
        *cases,
        Case("CP2, ZeRO-3", 2, CP | THREE),
        Case("CP2, ZeRO-3, full recompute, GQA rotary SwiGLU RMSNorm", 2, CP | THREE | FULL, LLAMA),
    ]


def _four() -> list[Case]:
    return [
        Case("CP4", 4, FOUR),
        Case("CP4, GQA rotary SwiGLU RMSNorm", 4, FOUR, LLAMA),
        Case("CP2 x DP2, ZeRO-0", 4, CP | given(zero=0)),
        Case("CP2 x DP2, ZeRO-1, GQA rotary SwiGLU RMSNorm", 4, CP, LLAMA),
        Case("CP2 x DP2, ZeRO-2", 4, CP | given(zero=2)),
        Case("CP2 x TP2", 4, CP | given(tensor=2)),
        Case("CP2 x TP2 + SP, GQA rotary SwiGLU RMSNorm", 4, CP | SP, LLAMA),
        Case("CP2 x TP2 + SP, windows", 4, CP | SP, LOCAL),
        Case("CP2 x TP2 + SP, documents, windows", 4, CP | SP, LOCAL, data=DOCUMENTS),
        Case("CP4, documents, GQA rotary SwiGLU RMSNorm", 4, FOUR, LLAMA, data=DOCUMENTS),
        Case("CP2 x PP2, documents, full recompute", 4, CP | PP | FULL, data=DOCUMENTS),
        Case("CP2 x DP2, ZeRO-3, documents", 4, CP | THREE, LLAMA, data=DOCUMENTS),
        Case("CP2 x TP2 + SP, full recompute", 4, CP | SP | FULL),
        Case("CP2 x PP2", 4, CP | PP),
        Case("CP2 x PP2 interleaved, GQA rotary SwiGLU RMSNorm", 4, CP | VP, LLAMA),
        Case("CP2 x PP2, ZeRO-2, selective recompute", 4, CP | PP | SELECTIVE | given(zero=2)),
        Case("CP2 x TP2 + SP, Muon", 4, CP | SP, optimizer=MUON),
        Case("CP2 x TP2 + SP, bf16", 4, CP | SP, train=BF16),
        Case("CP2 x DP2, ZeRO-3", 4, CP | THREE),
        Case("CP2 x TP2 + SP, ZeRO-3", 4, CP | SP | THREE),
    ]


def _eight() -> list[Case]:
    return [
        Case(
            "CP2 x TP2 x PP2 + SP, documents, GQA rotary SwiGLU RMSNorm",
            8,
            CP | SP | PP,
            LLAMA,
            data=DOCUMENTS,
        ),
        Case("CP4 x DP2, ZeRO-2, documents, windows", 8, FOUR | given(zero=2), LOCAL, data=DOCUMENTS),
        Case("CP4 x TP2 + SP, ZeRO-1, documents, full recompute", 8, FOUR | SP | FULL, data=DOCUMENTS),
    ]


CONTEXT: dict[int, list[Case]] = {2: _two(), 4: _four(), 8: _eight()}
QUICK_OF_CONTEXT = (
    "CP2, documents, windows, growing batches and sequences",
    "CP2, GQA rotary SwiGLU RMSNorm",
    "CP2 x TP2 + SP, GQA rotary SwiGLU RMSNorm",
)
