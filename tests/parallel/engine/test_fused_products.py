"""Gradients that products add to their sums, and branches that they add to the stream.

Under layouts, against operators of their own. Sums over micro-batches add up the same numbers in
the same order; what is put into one product is rounded once less.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from model.layers import products
from parallel.engine import overlap
from parallel.engine.gradients import GradientBuffer
from tests.distributed import Group, gather, launch
from tests.parallel.layouts import FULL, LLAMA, OPTIMIZER, PP, SELECTIVE, SP, TP, UNTIED, VP, Case
from tests.parallel.training import SEQ2SEQ, Curve, engine_of, given, run_config, train, whole_parameters

STEPS = 4
MICRO_BATCHES = 4
"""Of a step, over all data-parallel ranks."""
SUMS = given(gradient_accumulation_fusion=True)
BOTH = SUMS | given(residual_in_product=True, kernels="local")
DROPOUT = given(hidden_dropout=0.1, attention_dropout=0.1)
CASES = [
    Case("tied, full recompute", 1, FULL, DROPOUT, SUMS),
    Case("both, selective recompute", 1, SELECTIVE, LLAMA | given(scheme="keel"), BOTH),
    Case("TP2", 2, TP, DROPOUT, SUMS),
    Case("TP2 + SP, full recompute", 2, SP | FULL, UNTIED | DROPOUT, SUMS),
    Case("PP2 interleaved", 2, VP, UNTIED, SUMS),
    Case("DP2, ZeRO-2", 2, given(zero=2), UNTIED | given(num_layers=12), SUMS),
    Case("both, PP2", 2, PP | given(zero=0), LLAMA, BOTH),
    Case("both, encoder-decoder, DP2", 2, {}, SEQ2SEQ | UNTIED | given(bias=False), BOTH),
]


def curve_of(case: Case, fused: bool) -> tuple[Curve, int, int]:
    """Runs inside ranks: a training, products that added to a sum, and pieces that left early."""
    config = run_config(case.model, case.parallel, case.train if fused else {}, **OPTIMIZER)
    early: list[int] = []
    start = GradientBuffer.start

    def noted(self: GradientBuffer, low: int) -> None:
        early.append(low)
        start(self, low)

    with (
        patch.object(overlap, "SMALLEST", 0),
        patch.object(GradientBuffer, "start", noted),
        patch.object(products, "add_product", wraps=products.add_product) as added,
    ):
        engine = engine_of(config)
        curve = train(config, engine, 0, STEPS)
    curve.parameters, curve.unequal = whole_parameters(engine)
    return curve, sum(gather(added.call_count)), sum(low > 0 for low in early)


def ranks(cases: list[Case]) -> dict[str, Any]:
    return {case.name: [curve_of(case, fused) for fused in (False, True)] for case in cases}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    groups = [[case for case in CASES if case.world == world] for world in (1, 2)]
    one, two = launch(*(Group(cases[0].world, ranks, (cases,)) for cases in groups))
    return one[0] | two[0]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_products_that_add_train_as_those_that_do_not(case: Case, found: dict[str, Any]) -> None:
    (plain, none, _), (fused, added, _) = found[case.name]
    model = case.config().model
    linear = sum(4 + 3 * place.stack.cross for place in model.placed_layers()) + 1
    assert none == 0
    # A tensor-parallel rank has a part of every weight.
    assert added == STEPS * MICRO_BATCHES * linear * case.parallel.get("tensor", 1)
    assert not fused.unequal
    assert fused.losses == pytest.approx(plain.losses, rel=1e-6)
    assert fused.norms == pytest.approx(plain.norms, rel=1e-6)
    # Where embedding and output are one, their gradients are added up in another order.
    # Adam moves elements whose gradient is rounding noise at full speed, 1e-3 a step.
    most = 5e-5 if not model.tie_embeddings else 3e-4
    for name, tensor in plain.parameters.items():
        assert float((fused.parameters[name] - tensor).abs().max()) < most, name


def test_gradients_leave_as_early_as_without(found: dict[str, Any]) -> None:
    (_, _, plain), (_, _, fused) = found["DP2, ZeRO-2"]
    assert fused == plain >= 3 * STEPS
