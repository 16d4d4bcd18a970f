"""Shares of branches: the published equations in float64, compiled layers, and the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model.depth.ramp import share
from model.depth.schemes import SCHEMES
from model.layers.branch_share import BranchShares
from model.layers.compiled import compile_joins, compile_layers
from parallel.launch.one_process import single_process
from tests.model.layers import test_compiled
from tests.model.layers.test_layer import HEADS, LAYERS, TOKENS, WIDTH, build, compare, reference_weights
from tests.reference import prores
from tests.reference.parts import Options

SPAN, DONE = 3, 5
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "pre_ln": prores.pre_ln,
    "post_ln": prores.post_ln,
    "deepnorm": partial(prores.post_ln, residual=(2 * LAYERS) ** 0.25),
    "peri_ln": prores.peri_ln,
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    single_process()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["linear", "stagewise"])
@pytest.mark.parametrize("scheme", REFERENCES)
def test_stack_equals_the_published_equation(scheme: str, kind: str) -> None:
    stack = build(scheme)
    layers = reference_weights(stack, scheme)
    BranchShares(stack.layers, kind, SPAN, LAYERS).fill(DONE)  # type: ignore[arg-type]
    shares = [share(kind, layer, LAYERS, SPAN, DONE) for layer in range(1, LAYERS + 1)]
    assert len({*shares} - {1.0}) > 0
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    reference = REFERENCES[scheme](x, layers, Options(heads=HEADS, activation="gelu"), shares)
    compare(stack, layers, stack(x), reference, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_branch_without_a_share_adds_nothing_and_a_whole_one_changes_no_bit(scheme: str) -> None:
    stack, x = build(scheme), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    plain = stack(x)
    shares = BranchShares(stack.layers, "equal", SPAN, LAYERS)  # type: ignore[arg-type]
    assert torch.equal(stack(x), plain)  # all are 1 before they are filled
    shares.fill(0)
    nothing = stack(x)
    with torch.no_grad():
        for layer in stack.layers:
            for name, parameter in layer.named_parameters():  # type: ignore[union-attr]
                if "linear_qkv" in name or "linear_fc1" in name:
                    parameter.add_(1.0)
    assert torch.equal(stack(x), nothing)
    shares.fill(SPAN * LAYERS)
    assert all(join.share is None for layer in stack.layers for join in layer.joins())  # type: ignore[union-attr, operator]
    shares.fill(DONE)
    assert not torch.equal(stack(x), nothing)


@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_pre_ln", "b2t"])
def test_compiled_layers_follow_the_shares_without_another_compilation(scheme: str) -> None:
    found: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = {"plain": [], "compiled": []}
    graphs, backend = test_compiled.counting()
    for kind, results in found.items():
        model = test_compiled.build(scheme)
        shares = BranchShares(model.decoder.layers, "linear", SPAN, 8)
        if kind == "compiled":
            compile_layers([model], backend=backend)
        for done in (2, 5, 24, 25):
            shares.fill(done)
            results.append(test_compiled.loss_and_gradients(model))
    assert len(graphs) == 1
    for (loss, gradients), (again, others) in zip(*found.values(), strict=True):
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_compiled_joins_follow_the_shares() -> None:
    model = test_compiled.build("b2t")
    shares = BranchShares(model.decoder.layers, "linear", SPAN, 8)
    shares.fill(5)
    loss, _ = test_compiled.loss_and_gradients(model)
    graphs, backend = test_compiled.counting()
    assert compile_joins([model], backend=backend)
    again, _ = test_compiled.loss_and_gradients(model)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    count = len(graphs)
    shares.fill(6)
    moved, _ = test_compiled.loss_and_gradients(model)
    assert len(graphs) == count
    assert moved != again


def test_shares_in_sixteen_bits() -> None:
    """They are in the format of the branches, so that no product is in another one."""
    model: Any = test_compiled.build("pre_ln").to(torch.bfloat16)
    for layer in model.decoder.layers:
        layer.branch_dtype = torch.bfloat16
    shares = BranchShares(model.decoder.layers, "linear", 1000, 1000)
    shares.fill(999)
    assert shares.values.dtype == torch.bfloat16
    for row, number in zip(shares.values, range(1, 9), strict=True):
        assert float(row[0]) == pytest.approx(share("linear", number, 1000, 1000, 999), rel=2**-8)
