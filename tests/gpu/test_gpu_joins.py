"""Our Triton kernels on a GPU: against float64, and models against PyTorch's parts.

Joins with norms, activations with biases, gates and norms, and heads out of their product.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from model.depth.schemes import SCHEMES
from tests.gpu.test_gpu_numerics import check, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("width", [40, 257, 2048, 16384])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_results_and_gradients_are_the_reference_s(dtype: torch.dtype, width: int) -> None:
    """Every set of terms; more rows than programs, and not a multiple of them."""
    from tests.model.layers.join_worker import TERMS, error, joins_and_gradients

    for name, terms in TERMS.items():
        ours, theirs = joins_and_gradients(terms, width, dtype, device="cuda", rows=(1201,))
        # Sums over rows have that many roundings.
        assert error(ours, theirs) < LIMITS[dtype] * 4, name


@pytest.mark.parametrize("width", [257, 2048, 16384])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_activations_and_gradients_are_pytorch_s(dtype: torch.dtype, width: int) -> None:
    from tests.model.layers.activation_worker import FUNCTIONS, results_and_gradients
    from tests.model.layers.join_worker import error

    for kind in FUNCTIONS:
        for gated in (False, True):
            made = results_and_gradients(
                kind, dtype, width, gated=gated, biased=True, device="cuda", rows=(401, 3)
            )
            assert error(*made) < LIMITS[dtype] * 4, (kind, gated)


@pytest.mark.parametrize("width", [257, 2048, 8192])
@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_activations_with_norms_and_gradients_are_pytorch_s(dtype: torch.dtype, width: int) -> None:
    """More rows than programs, and not a multiple of them."""
    from tests.model.layers.activation_worker import FUNCTIONS
    from tests.model.layers.join_worker import error
    from tests.model.layers.normed_worker import results_and_gradients

    for kind in FUNCTIONS:
        for terms in ("", "centred", "biased centred", "gated", "gated biased centred"):
            made = results_and_gradients(kind, dtype, width, terms, "cuda", rows=(401, 3))
            assert error(*made) < LIMITS[dtype] * 4, (kind, terms)


@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
def test_heads_and_gradients_are_the_reference_s(dtype: torch.dtype) -> None:
    from tests.model.layers.heads_worker import CASES, results_and_gradients
    from tests.model.layers.join_worker import error

    for name in CASES:
        made = results_and_gradients(name, dtype, "cuda", positions=401)
        assert error(*made) < LIMITS[dtype] * 4, name


def test_dropout_is_drawn_again_from_its_seed() -> None:
    from model.layers.join_pass import join_norm
    from model.layers.joined import After, Numbers

    branch = torch.ones(4096, 1000, device="cuda", requires_grad=True)
    numbers = Numbers(1.0, 1.0, 0.0, dropout=0.25)
    stream, *_ = join_norm(torch.zeros_like(branch), branch, None, None, None, After(), numbers)
    stream.backward(torch.ones_like(stream))
    assert branch.grad is not None
    assert torch.equal(branch.grad, stream.detach())
    assert float((stream != 0).double().mean()) == pytest.approx(0.75, abs=2e-3)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("kernels", ["local_joined", pytest.param("te_joined", marks=pytest.mark.te)])
def test_every_scheme_in_bf16(scheme: str, kernels: str) -> None:
    check(compare(scheme, "gpt", kernels), "bf16")
