"""Options of schemes that change the connections, in float64: factors on branches and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.depth.schemes import SCHEMES
from model.stack import Stack
from parallel.launch.one_process import single_process
from tests.reference import b2t, post_ln
from tests.reference.parts import Options

WIDTH, HEADS, TOKENS = 16, 4, 7
REFERENCES = {"post_ln": post_ln.stack, "b2t": b2t.stack}
NORMS = {"pre_mlp_layernorm": "ln1", "mlp_output_norm": "ln2"}


@pytest.fixture(scope="module", autouse=True)
def _process() -> None:
    single_process()


def build(scheme: str, layers: int, biases: float = 0.0, **options: Any) -> Stack:
    """A stack with the same random matrices, and biases, for every scheme and option."""
    stack = Stack(
        scheme,
        num_layers=layers,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        options=options,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "norm" not in name:
                std = biases if name.endswith("bias") else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return stack


def entering() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(2, TOKENS, WIDTH, dtype=torch.float64, generator=generator)


def norm_name(name: str) -> str:
    norm, _, leaf = name.rpartition(".")
    return name if norm not in NORMS else NORMS[norm] + ("_b" if leaf == "bias" else "")


@pytest.mark.parametrize("scheme", REFERENCES)
def test_a_branch_factor_is_one_on_the_output_projections(scheme: str) -> None:
    """c / N before the branch is the reference with o and fc2, biases too, times c / N."""
    layers, factor = 6, 2.5 / 6
    stack = build(scheme, layers, biases=0.2, branch=2.5)
    weights = []
    for index in range(layers):
        own = {norm_name(name): value for name, value in stack.weights(index).items()}
        for name in ("o", "bo", "fc2", "bfc2"):
            own[name] = own[name] * factor
        weights.append(own)
    expected = REFERENCES[scheme](entering(), weights, Options(heads=HEADS, activation="gelu"))
    torch.testing.assert_close(stack(entering()), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layers", [6, 48, 192])
@pytest.mark.parametrize(
    ("scheme", "options"), [("post_ln", {"rescale": True}), ("b2t", {"rescale": True}), ("deepnorm", {})]
)
def test_gains_of_weights_and_factors_in_the_forward_pass_are_one_function(
    scheme: str, options: dict[str, Any], layers: int
) -> None:
    """Outputs and, by the chain rule, gradients agree while biases are zero."""
    gained, forward = build(scheme, layers, **options), build(scheme, layers, in_forward=True, **options)
    gains = SCHEMES[scheme].gain_plan(layers, options)
    assert SCHEMES[scheme].gain_plan(layers, {**options, "in_forward": True}) == ({},) * layers
    for index, gain in enumerate(gains):
        weights = gained.weights(index)
        # Of cross-attention there are gains and, in a decoder alone, no weights.
        own = {str(role): weights[role] * factor for role, factor in gain.items() if role in weights}
        gained.set_weights(index, own)
    ours, theirs = forward(entering()), gained(entering())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(9))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for index, gain in enumerate(gains):
        inside, outside = forward.gradients(index), gained.gradients(index)
        for role in ("q", "k", "v", "o", "fc1", "fc2"):
            expected = outside[role] * gain.get(role, 1.0)
            scale = float(expected.abs().max())
            torch.testing.assert_close(inside[role], expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("layers", [12, 48, 192])
def test_b2t_with_twice_the_branch_is_nearly_post_ln(layers: int) -> None:
    """To first order in 1/N the layer's input, added again, halves the branch."""
    with torch.no_grad():
        ours = build("b2t", layers, branch=2.0)(entering())
        theirs = build("post_ln", layers, branch=1.0)(entering())
    assert float((ours - theirs).norm() / theirs.norm()) < 1 / layers
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("scheme", "options", "text"),
    [
        ("b2t", {"rescale": True, "branch": 2.0}, "rescale=true has no effect with branch=2.0"),
        ("b2t", {"in_forward": True, "branch": 2.0}, "in_forward=true has no effect with branch=2.0"),
        ("post_ln", {"in_forward": True}, "in_forward=true has no effect"),
        ("b2t", {"rescale": False, "in_forward": True}, "in_forward=true has no effect"),
        ("b2t", {"branch": -1.0}, "must be from 0"),
        ("deepnorm", {"branch": 1.0}, "has no effect with model.scheme=deepnorm"),
    ],
)
def test_an_option_without_effect_is_refused(scheme: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SCHEMES[scheme].plan(4, options)
