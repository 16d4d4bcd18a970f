"""Joins computed with the norms after them, under layouts that cut or repeat what they act on.

Against one process with both apart. TORCHDYNAMO_DISABLE=1 leaves the compiler out: quicker.
"""

from __future__ import annotations

import pytest

from tests.parallel.layouts import BF16, DEEP, SP, VP, Case, Row, check, ids, measure, selected
from tests.parallel.training import given

pytestmark = pytest.mark.slow
JOINED = given(kernels="local_joined")
GROUPS = given(recompute=given(granularity="full", num_layers=2))
CASES = [
    Case("TP2 + SP", 2, SP, given(scheme="b2t"), JOINED, reference_train={}),
    Case("PP2 interleaved", 2, VP, train=JOINED, reference_train={}),
    Case("full recompute, groups of 2", 1, GROUPS, DEEP, JOINED, reference_train={}),
    Case("DP2, ZeRO-2, bf16", 2, given(zero=2), train=JOINED | BF16, reference_train=BF16),
]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> dict[str, Row]:
    return measure(selected(request, CASES))


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_layout_equals_one_process(case: Case, rows: dict[str, Row]) -> None:
    check(case, rows[case.name])
