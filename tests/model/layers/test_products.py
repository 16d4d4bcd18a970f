"""Products that add onto what is there, against plain operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.depth.schemes import SCHEMES
from model.layers.products import add_in_products, product, sum_in_products
from model.stack import Stack
from parallel.launch.one_process import single_process

FACTOR = 0.37


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_values_and_gradients_are_those_of_plain_operators(residual: bool, summed: bool) -> None:
    x, weight, onto = (
        drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(5, 2, 6), (4, 6), (5, 2, 4)])
    )
    bias = None if residual else drawn(4, seed=3).requires_grad_()
    before = drawn(4, 6, seed=4)
    total = before.clone()
    factor, kept = (FACTOR, onto) if residual else (1.0, None)
    out = product(x, weight, bias, kept, factor, total if summed else None)
    plain = F.linear(x, weight, bias) * factor + (onto if residual else 0)
    torch.testing.assert_close(out, plain, rtol=1e-14, atol=1e-14)
    inputs = [one for one in (x, bias, kept) if one is not None]
    ours, theirs = (
        torch.autograd.grad(y, [*inputs, weight], drawn(5, 2, 4, seed=5), allow_unused=True)
        for y in (out, plain)
    )
    if summed:
        assert ours[-1] is None
        ours = (*ours[:-1], total - before)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_who_waits_for_a_gradient_hears_of_one_that_a_product_has_added() -> None:
    """As the reduction in backward passes does; a frozen weight gets nothing."""
    heard: list[bool] = []
    weight, total = nn.Parameter(drawn(4, 6)), torch.zeros(4, 6, dtype=torch.float64)
    weight.register_post_accumulate_grad_hook(lambda one: heard.append(bool(total.any())))
    x = drawn(3, 6).requires_grad_()
    product(x, weight, total=total).sum().backward()
    assert heard == [True]
    assert weight.grad is None
    added, before = total.clone(), x.grad
    assert before is not None
    product(x, weight.requires_grad_(False), total=total).sum().backward()
    assert torch.equal(total, added)
    assert heard == [True]


def stack_of(scheme: str) -> Any:
    torch.manual_seed(0)
    stack = Stack(
        scheme, num_layers=3, hidden_size=16, num_attention_heads=2, dtype=torch.float64, bias=False
    )
    for parameter in stack.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return stack.train()


def passed(stack: Any) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input, [batch, tokens, hidden]."""
    x_bsh = drawn(2, 5, 16, seed=1).requires_grad_()
    y_bsh: Tensor = stack(x_bsh)
    y_bsh.square().mean().backward()
    assert x_bsh.grad is not None
    return y_bsh.detach(), x_bsh.grad


@pytest.mark.parametrize("scheme", SCHEMES)
def test_branches_that_end_in_the_stream_are_those_that_are_added_to_it(scheme: str) -> None:
    single_process()
    plain, fused = stack_of(scheme), stack_of(scheme)
    layers = list(fused.layers)
    found = add_in_products(layers)
    assert found == sum(part.adds_product for layer in layers for _, part, _, _, _ in layer.parts())
    assert found or scheme == "peri_ln"
    sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in fused.parameters()]
    for parameter, total in zip(fused.parameters(), sums, strict=True):
        parameter.grad = parameter.main_grad = total  # type: ignore[attr-defined]
    assert sum_in_products([fused]) == 4 * len(layers)
    expected = passed(plain)
    torch.testing.assert_close(passed(fused), expected, rtol=1e-12, atol=1e-13)
    for parameter, total in zip(plain.parameters(), sums, strict=True):
        torch.testing.assert_close(total, parameter.grad, rtol=1e-11, atol=1e-12)
    assert not any(join.added for layer in layers for join in layer.joins())


def test_who_listens_to_a_join_hears_the_branch_alone() -> None:
    single_process()
    heard: dict[bool, list[Tensor]] = {True: [], False: []}
    for fused, branches in heard.items():
        stack = stack_of("pre_ln")
        if fused:
            assert add_in_products(stack.layers) == 6
        join = stack.layers[1].mlp_join
        handle = join.register_forward_hook(lambda one, args, out, kept=branches: kept.append(args[1]))
        passed(stack)
        handle.remove()
        stack.eval()
        passed(stack)
    torch.testing.assert_close(heard[True], heard[False], rtol=1e-12, atol=1e-12)
    assert len(heard[True]) == 1


def test_a_share_of_the_branch_is_not_lost() -> None:
    single_process()
    plain, fused = stack_of("deepnorm"), stack_of("deepnorm")
    add_in_products(fused.layers)
    for stack in (plain, fused):
        stack.layers[0].mlp_join.share = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(passed(fused), passed(plain), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("switch", ["leaves_bias", "lends_bias"])
def test_biases_of_kernels_that_take_them_stay_theirs(switch: str) -> None:
    """As `train.kernels: local_joined` has them: out of the product, or without a gradient."""
    single_process()
    stack = Stack("pre_ln", num_layers=1, hidden_size=16, num_attention_heads=2, dtype=torch.float64)
    linear: Any = stack.layers[0].mlp.linear_fc1  # type: ignore[union-attr]
    setattr(linear, switch, True)
    linear.weight.main_grad = torch.zeros_like(linear.weight)
    nn.init.normal_(linear.weight)
    nn.init.normal_(linear.bias)
    x = drawn(3, 2, 16)
    (plain, _), _ = linear(x), sum_in_products([linear])
    fused, left = linear(x)
    assert left is linear.bias
    assert torch.equal(fused, plain)
    fused.sum().backward()
    assert linear.bias.grad is None
    assert linear.weight.main_grad.any()
