"""Options of attention, positions, logits and loss under layouts that cut what they act on."""

from __future__ import annotations

import pytest

from tests.parallel.layouts import LLAMA, PP, SELECTIVE, SP, THREE, TP, Case, Row, measure
from tests.parallel.training import given

CAPPED = LLAMA | given(
    attention=given(qk_norm=True, soft_cap=2.0, qkv_bias=True),
    rotary=given(share=0.5, scaling="yarn", factor=4.0, original_positions=12),
    logit_soft_cap=4.0,
)
CASES = [
    Case("TP2 + SP", 2, SP, CAPPED, given(z_loss=0.01, loss_chunk=6), reference_train=given(z_loss=0.01)),
    Case("TP2, selective recompute", 2, TP | SELECTIVE, CAPPED, given(z_loss=0.01, label_smoothing=0.1)),
    Case("PP2", 2, PP, CAPPED, given(z_loss=0.01)),
    Case("PP2, chunks of losses", 2, PP, {}, given(loss_chunk=5), reference_train={}),
    Case("DP2, ZeRO-3, chunks of losses", 2, THREE, {}, given(loss_chunk=5), reference_train={}),
]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return measure(CASES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_layout_equals_one_process(case: Case, rows: dict[str, Row]) -> None:
    row = rows[case.name]
    assert not row.unequal
    assert row.loss <= case.tolerance.loss
    assert row.norm <= case.tolerance.norm
    assert row.parameters <= case.tolerance.parameters
