"""Losses and gradients of every kind of kernel and precision against PyTorch's in fp32.

Both are on the same weights.
Tolerances are on (relative difference of the mean loss,
norm of the difference of all gradients over their norm).
They are two to four times what bf16 rounding, and FP8 rounding emulated in plain PyTorch,
were seen to give over all schemes: 2e-4 and 0.016 for bf16, 3e-3 and 0.19 for FP8.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.depth.schemes import SCHEMES
from model.layers.context import causal_tail
from model.network.parts import Kernels
from parallel.hardware.precision import RECIPES, this_machine
from tests.gpu.gpu_models import build, numerics_of, one_pass, round_weights, tokens
from tests.model.narrow import cosine, narrow, seen

TOLERANCE = {"bf16": (1e-3, 0.04), "fp8": (1e-2, 0.35)}
KINDS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "num_query_groups": 1,
        "position": "rotary",
        "tie_embeddings": False,
        "bias": False,
    },
}
DELAY = 3
"""Passes after which delayed scaling has seen the sizes of all its tensors.

Before, it scales by 1.
"""


@pytest.fixture(autouse=True)
def _exact_fp32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def compare(
    scheme: str, kind: str, kernels: str, recipe: str = "none", *, first_last_bf16: bool = False
) -> tuple[float, float]:
    """Differences of one pass from the same in fp32 by local kernels."""
    model = {"scheme": scheme, **KINDS[kind]}
    batch = tokens()
    reference = one_pass(round_weights(build(numerics_of("fp32", "local"), **model)), batch)
    chunk = build(numerics_of("bf16", kernels, recipe, first_last_bf16=first_last_bf16), **model)
    for _ in range(DELAY if recipe == "delayed" else 0):
        one_pass(chunk, batch)
    return one_pass(chunk, batch).difference(reference)


def check(found: tuple[float, float], precision: str) -> None:
    loss, gradient = found
    assert loss < TOLERANCE[precision][0]
    assert gradient < TOLERANCE[precision][1]


def needs(recipe: str) -> None:
    """Skips where a recipe does not run."""
    machine = this_machine()
    assert machine.te, machine.te_problem
    if recipe not in machine.recipes():
        pytest.skip(
            f"FP8 recipe {recipe} does not run on {machine.gpu} with CUDA {machine.cuda[0]}.{machine.cuda[1]}"
        )


@pytest.mark.parametrize("where", ["here", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_local_bf16(scheme: str, kind: str, where: str) -> None:
    check(compare(scheme, kind, "local"), "bf16")


@pytest.mark.parametrize("kernels", ["local", pytest.param("te", marks=pytest.mark.te)])
@pytest.mark.parametrize("fp32_residual", [False, True], ids=["bf16 stream", "fp32 stream"])
@pytest.mark.parametrize("scheme", ["pre_ln", "b2t", "deepscalelm_pre_ln", "deepscalelm_post_ln", "deepnorm"])
@pytest.mark.gpu
def test_deep_models_in_bf16(scheme: str, fp32_residual: bool, kernels: Kernels) -> None:
    """384 layers: constants that 16 bits cannot hold have long added up.

    As tests/model/layers/test_sixteen_bits.py on CPUs.
    """
    core = {"fp32_residual_connection": fp32_residual}
    exact = seen(narrow(scheme, 384))
    half = seen(narrow(scheme, 384, torch.bfloat16, kernels=kernels, core=core))
    assert cosine(half.logits, exact.logits) > (0.9995 if fp32_residual else 0.995)
    if abs(exact.likeness) > 0.1:
        assert half.share == pytest.approx(exact.share, rel=0.01)


@pytest.mark.te
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_transformer_engine_bf16(scheme: str, kind: str) -> None:
    check(compare(scheme, kind, "te"), "bf16")


@pytest.mark.te
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_transformer_engine_fp8(recipe: str, scheme: str, kind: str) -> None:
    needs(recipe)
    check(compare(scheme, kind, "te", recipe), "fp8")


@pytest.mark.te
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_fp8_is_really_used(recipe: str) -> None:
    """FP8 differs from bf16, more in the gradients than bf16 differs from fp32.

    With the first and last layer in bf16 it differs again.
    """
    needs(recipe)
    batch = tokens()
    plain = one_pass(build(numerics_of("bf16", "te")), batch)
    in_fp8 = one_pass(build(numerics_of("bf16", "te", recipe)), batch)
    assert not torch.equal(plain.losses, in_fp8.losses)
    assert in_fp8.difference(plain)[1] > 0.02
    if recipe != "delayed":
        partly = one_pass(build(numerics_of("bf16", "te", recipe, first_last_bf16=True)), batch)
        assert not torch.equal(partly.losses, in_fp8.losses)
        assert not torch.equal(partly.losses, plain.losses)


@pytest.mark.te
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_normed_input_is_not_kept(scheme: str) -> None:
    """The fused norm hands its output over once.

    A layer that held on to it would keep one activation a layer alive.
    """
    chunk = build(numerics_of("bf16", "te"), scheme=scheme)
    one_pass(chunk, tokens())
    for layer in chunk.decoder.layers:
        assert getattr(layer.mlp.linear_fc1, "normed", None) is None
        assert getattr(layer.self_attention.linear_qkv, "normed", None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_last_queries_of_a_sequence_see_all_before_them(
    dtype: torch.dtype, close: float, groups: int
) -> None:
    """Attention of a piece of a sequence that is cut, in the GPU's own kernels."""
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(heads: int, length: int) -> torch.Tensor:
        shape = (2, heads, length, 64)
        return torch.randn(shape, dtype=dtype, device="cuda", generator=generator).requires_grad_()

    query, key, value = drawn(8, 128), drawn(groups, 512), drawn(groups, 512)
    mask = torch.ones(128, 512, dtype=torch.bool, device="cuda").tril(384)
    wide = q, k, v = [part.detach().double().requires_grad_() for part in (query, key, value)]
    found, expected = (
        causal_tail(query, key, value),
        F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=groups < 8),
    )
    pairs = [(found, expected)]
    weight = torch.randn_like(expected)
    pairs += zip(
        torch.autograd.grad(found, (query, key, value), weight.to(dtype)),
        torch.autograd.grad(expected, wide, weight),
        strict=True,
    )
    for ours, theirs in pairs:
        assert float((ours.double() - theirs).norm() / theirs.norm()) < close
