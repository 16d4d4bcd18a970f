"""Our Megatron-core layers against independent plain-PyTorch references, in float64.

Outputs and all gradients are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from model.depth.schemes import SCHEMES
from model.stack import Stack
from parallel.launch.one_process import single_process
from tests.reference import (
    b2t,
    deepnorm,
    deepscalelm,
    gpas,
    gpt,
    hybridnorm,
    keel,
    layernorm_scaling,
    mix_ln,
    peri_ln,
    post_ln,
    pre_ln,
    spannorm,
    subln,
)
from tests.reference.parts import Options

LAYERS, WIDTH, HEADS, TOKENS = 4, 16, 4, 7
STACKS: dict[str, Any] = {
    "pre_ln": pre_ln.stack,
    "post_ln": post_ln.stack,
    "b2t": b2t.stack,
    "deepscalelm_pre_ln": deepscalelm.pre_ln_stack,
    "deepscalelm_post_ln": deepscalelm.post_ln_stack,
    "deepnorm": deepnorm.stack,
    "layernorm_scaling": layernorm_scaling.stack,
    "peri_ln": peri_ln.stack,
    "mix_ln": mix_ln.stack,
    "spannorm": spannorm.stack,
    "keel": keel.stack,
    "gpas": gpas.stack,
    "hybridnorm": hybridnorm.stack,
    "subln": subln.stack,
}


@pytest.fixture(scope="module", autouse=True)
def _process() -> None:
    single_process()


def build(scheme: str, **arguments: Any) -> Stack:
    """A stack with random weights, biases, gains and norm shifts."""
    torch.manual_seed(3)
    stack = Stack(
        scheme,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        dtype=torch.float64,
        **arguments,
    )
    for name, parameter in stack.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return stack


def reference_weights(stack: Stack, scheme: str) -> list[dict[str, torch.Tensor]]:
    """The stack's weights under the references' names, as leaves."""
    layers = []
    for index in range(LAYERS):
        norms = gpt.norms_of(scheme, index, LAYERS, {})
        layers.append(
            {
                reference_name(name, norms): value.requires_grad_()
                for name, value in stack.weights(index).items()
            }
        )
    return layers


def reference_name(name: str, norms: Mapping[str, str]) -> str:
    norm, _, kind = name.rpartition(".")
    if norm == "gpas":
        return kind
    return name if norm not in norms else norms[norm] + ("_b" if kind == "bias" else "")


def compare(
    stack: Stack, layers: list[dict[str, torch.Tensor]], ours: torch.Tensor, theirs: torch.Tensor, scheme: str
) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    direction = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(5))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    for index, weights in enumerate(layers):
        norms = gpt.norms_of(scheme, index, LAYERS, {})
        gradients = {reference_name(name, norms): value for name, value in stack.gradients(index).items()}
        assert gradients.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_stack_equals_reference(scheme: str, causal: bool) -> None:
    stack = build(scheme, causal=causal)
    layers = reference_weights(stack, scheme)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    compare(
        stack,
        layers,
        stack(x),
        STACKS[scheme](x, layers, Options(heads=HEADS, causal=causal, activation="gelu")),
        scheme,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swiglu", "normalization": "rmsnorm", "num_query_groups": 2},
        {"activation": "gelu_tanh"},
        {"activation": "relu"},
        {"activation": "relu2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("scheme", ["b2t", "deepscalelm_pre_ln", "peri_ln", "subln"])
def test_kinds_of_parts(scheme: str, options: dict[str, Any]) -> None:
    stack = build(scheme, **options)
    layers = reference_weights(stack, scheme)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    reference = Options(
        heads=HEADS,
        groups=options.get("num_query_groups"),
        activation=options["activation"],
        norm=options.get("normalization", "layernorm"),
    )
    compare(stack, layers, stack(x), STACKS[scheme](x, layers, reference), scheme)


def test_keel_with_a_constant_of_its_own() -> None:
    stack = build("keel", options={"alpha": 3.0})
    layers = reference_weights(stack, "keel")
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    reference = keel.stack(x, layers, Options(heads=HEADS, activation="gelu"), alpha=3.0)
    compare(stack, layers, stack(x), reference, "keel")


@pytest.mark.parametrize("groups", [None, 2])
def test_hybridnorm_in_its_other_form(groups: int | None) -> None:
    """HybridNorm*, with grouped queries and RMSNorm too."""
    norm = "layernorm" if groups is None else "rmsnorm"
    options = {"star": True}
    stack = build("hybridnorm", options=options, num_query_groups=groups, normalization=norm)
    layers = []
    for index in range(LAYERS):
        norms = gpt.norms_of("hybridnorm", index, LAYERS, options)
        own = stack.weights(index).items()
        layers.append({reference_name(name, norms): value.requires_grad_() for name, value in own})
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    reference = Options(heads=HEADS, groups=groups, activation="gelu", norm=norm)
    ours, theirs = stack(x), hybridnorm.stack(x, layers, reference, star=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for index, weights in enumerate(layers):
        norms = gpt.norms_of("hybridnorm", index, LAYERS, options)
        for name, value in stack.gradients(index).items():
            expected = weights[reference_name(name, norms)].grad
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_every_scheme_has_a_reference() -> None:
    assert STACKS.keys() == SCHEMES.keys()


def test_b2t_with_cross_attention() -> None:
    stack = build("b2t", cross=True)
    norms = {"pre_cross_attn_layernorm": "ln1", "pre_mlp_layernorm": "ln2", "mlp_output_norm": "ln3"}
    layers = [
        {reference_name(name, norms): value.requires_grad_() for name, value in stack.weights(index).items()}
        for index in range(LAYERS)
    ]
    x, memory = (
        torch.randn(2, TOKENS, WIDTH, dtype=torch.float64),
        torch.randn(2, 5, WIDTH, dtype=torch.float64),
    )
    ours, theirs = (
        stack(x, memory),
        b2t.decoder_stack(x, memory, layers, Options(heads=HEADS, activation="gelu")),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    (ours.square().sum()).backward()
    (theirs.square().sum()).backward()
    for index, weights in enumerate(layers):
        for name, value in stack.gradients(index).items():
            torch.testing.assert_close(
                value, weights[reference_name(name, norms)].grad, rtol=1e-10, atol=1e-9
            )


def test_unknown_names_and_options_are_refused() -> None:
    stack = build("pre_ln")
    with pytest.raises(ValueError, match="has no 'w'"):
        stack.set_weights(0, {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="no effect with model.scheme=pre_ln"):
        Stack("pre_ln", num_layers=2, hidden_size=8, num_attention_heads=2, options={"rescale": True})
