"""Options of attention, logits, loss and data under layouts that cut what they act on."""

from __future__ import annotations

import pytest

from tests.parallel.context_layouts import CAPPED
from tests.parallel.layouts import (
    DOCUMENTS,
    FULL,
    GROWING,
    LLAMA,
    LOCAL,
    PP,
    SELECTIVE,
    SP,
    THREE,
    TP,
    VP,
    Case,
    Row,
    check,
    ids,
    measure,
    selected,
)
from tests.parallel.training import given

TURNED = CAPPED | given(rotary=given(share=0.5, scaling="yarn", factor=4.0, original_positions=12))
ADDING = given(loss_kernel="torch", gradient_accumulation_fusion=True)
CASES = [
    Case("TP2 + SP", 2, SP, TURNED, given(z_loss=0.01, loss_chunk=6), reference_train=given(z_loss=0.01)),
    Case("TP2, selective recompute", 2, TP | SELECTIVE, TURNED, given(z_loss=0.01, label_smoothing=0.1)),
    Case("PP2", 2, PP, TURNED, given(z_loss=0.01)),
    Case("PP2, chunks of losses", 2, PP, {}, given(loss_chunk=5), reference_train={}),
    Case("PP2, losses by torch, products that add", 2, PP, {}, ADDING, reference_train={}),
    Case("DP2, ZeRO-3, chunks of losses", 2, THREE, {}, given(loss_chunk=5), reference_train={}),
    Case(
        "documents, 8 micro-batches of 1 against 1 of 8",
        1,
        train=given(micro_batch_size=1),
        reference_train=given(micro_batch_size=8),
        data=DOCUMENTS,
    ),
    Case("documents, windows, full recompute", 1, FULL, LOCAL, data=DOCUMENTS, exact=True),
    Case("documents, selective recompute, ZeRO-2", 1, SELECTIVE | given(zero=2), LLAMA, data=DOCUMENTS),
    Case("TP2 + SP, documents, windows", 2, SP, LOCAL, data=DOCUMENTS),
    Case("DP2, ZeRO-3, documents", 2, THREE, data=DOCUMENTS),
    Case("PP2 interleaved, growing batches and sequences", 2, VP, schedule=GROWING),
    Case(
        "TP2 + SP, growing batches and sequences, documents",
        2,
        SP,
        LLAMA,
        schedule=GROWING,
        data=DOCUMENTS,
    ),
    Case("DP2, ZeRO-2, growing batches and sequences", 2, given(zero=2), schedule=GROWING),
    Case(
        "TP2 x PP2 + SP, documents, windows, full recompute",
        4,
        given(tensor=2, pipeline=2, sequence_parallel=True) | FULL,
        LOCAL,
        data=DOCUMENTS,
    ),
]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    return measure(selected(request, CASES))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_layout_equals_one_process(case: Case, rows: dict[str, Row]) -> None:
    check(case, rows[case.name])
