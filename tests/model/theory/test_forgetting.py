"""The forgetting law: closed forms, and real layers whose branches add a vector that all share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.depth.scheme import Options
from model.depth.schemes import SCHEMES
from model.stack import Stack
from model.theory.forgetting import LayerPassage, Passage, along_common, log_factors, log_gradients
from parallel.launch.one_process import single_process

LAYERS, WIDTH = 5, 16
ATTENTION = [0.3, 0.1, 0.7, 0.02, 0.4]
MLP = [0.2, 0.5, 0.05, 1.3, 0.1]
PASSAGES = [along_common(a, f) for a, f in zip(ATTENTION, MLP, strict=True)]
CASES: list[tuple[str, Options]] = [*((name, {}) for name in SCHEMES), ("mix_ln", {"post_fraction": 0.5})]
# Of every norm: its gain, and its bias along the common vector.
GAIN, BIAS = 0.8, 0.3


def common() -> Tensor:
    """A vector that every norm leaves alone: mean 0, mean square 1, [WIDTH]."""
    return torch.tensor([1.0, -1.0] * (WIDTH // 2), dtype=torch.float64)


def forced(ratio: float) -> Callable[..., Any]:
    """A hook on a join: the branch becomes `ratio` times what it is added to."""

    def hook(join: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        residual, _, _, layer_input = args
        kept = join.residual_scale * residual + join.skip_scale * layer_input
        return residual, ratio * kept.detach() / join.branch_scale, None, layer_input

    return hook


def measured_logs(scheme: str, options: Options, *, biased: bool = False) -> list[float]:
    """ln of the gradient entering each layer over that leaving the last, in float64."""
    single_process()
    stack = Stack(
        scheme,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=2,
        options=options,
        dtype=torch.float64,
        norm_epsilon=1e-30,
    )
    entering: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0])
        args[0].retain_grad()

    for layer, attention, mlp in zip(stack.layers, ATTENTION, MLP, strict=True):
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        layer.self_attention_join.register_forward_pre_hook(forced(attention))  # type: ignore[union-attr,operator]
        layer.mlp_join.register_forward_pre_hook(forced(mlp))  # type: ignore[union-attr,operator]
        for name, parameter in layer.named_parameters():
            if biased and "norm" in name:
                parameter.data = torch.full_like(parameter, GAIN) if "weight" in name else BIAS * common()
    size = GAIN + BIAS if biased else 1.0
    x = (size * common()).expand(1, 3, WIDTH).clone().requires_grad_()
    y = stack(x)
    g = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    g = g - g.mean()
    g = g - common() * (g @ common()) / WIDTH
    (y[:, -1] @ g).sum().backward()
    # The gradient of a stream in other units is divided by its unit (`model/depth/folded.py`).
    return [
        math.log(float(stream.grad[-1].norm() / layer.plan.entering / g.norm()))  # type: ignore[index,operator,union-attr]
        for stream, layer in zip(entering, stack.layers, strict=True)
    ]


@pytest.mark.parametrize(("scheme", "options"), CASES)
def test_the_law_is_the_jacobian_of_real_layers(scheme: str, options: Options) -> None:
    plan = SCHEMES[scheme].plan(LAYERS, options)
    assert measured_logs(scheme, options) == pytest.approx(log_gradients(plan, PASSAGES), abs=1e-12)


@pytest.mark.parametrize("scheme", ["post_ln", "b2t", "spannorm", "deepscalelm_post_ln"])
def test_a_norms_bias_along_the_common_vector_is_forgotten_for_too(scheme: str) -> None:
    share = GAIN / (GAIN + BIAS)
    passages = [
        LayerPassage(Passage(one.attention.growth, share, share), Passage(one.mlp.growth, share, share))
        for one in PASSAGES
    ]
    expected = log_gradients(SCHEMES[scheme].plan(LAYERS), passages)
    assert measured_logs(scheme, {}, biased=True) == pytest.approx(expected, abs=1e-12)


def test_closed_forms() -> None:
    """Post-norm: every branch counts. B2T: attention counts half. Pre-norm: nothing counts."""

    def logs(scheme: str, **options: float) -> list[float]:
        return log_factors(SCHEMES[scheme].plan(LAYERS, options), PASSAGES)

    pairs = list(zip(ATTENTION, MLP, strict=True))
    post = [-math.log1p(a) - math.log1p(f) for a, f in pairs]
    for scheme in ("post_ln", "deepnorm", "deepscalelm_post_ln"):
        assert logs(scheme) == pytest.approx(post)
    assert logs("b2t") == pytest.approx([math.log((1 + 1 / (1 + a)) / 2) - math.log1p(f) for a, f in pairs])
    assert logs("spannorm") == pytest.approx([-math.log1p(f) for _, f in pairs])
    assert logs("mix_ln", post_fraction=0.4) == pytest.approx([*post[:2], 0.0, 0.0, 0.0])
    for scheme in ("pre_ln", "peri_ln", "layernorm_scaling"):
        assert logs(scheme) == [0.0] * LAYERS
    beta2 = 2 / (2 * LAYERS)
    assert logs("deepscalelm_pre_ln") == pytest.approx([math.log(1 - beta2)] * LAYERS)


def test_branches_of_one_over_n_forget_a_constant_and_of_its_root_all() -> None:
    def whole(layers: int, power: float) -> float:
        ratio = layers**-power
        return log_gradients(SCHEMES["post_ln"].plan(layers), [along_common(ratio, ratio)] * layers)[0]

    assert whole(1000, 1.0) == pytest.approx(-2.0, abs=2e-3)
    assert whole(1000, 0.5) < -60
    assert math.isnan(log_gradients(SCHEMES["post_ln"].plan(1), [along_common(math.nan, 0.1)])[0])
