"""Gradients that products add to their sums on a GPU, against gradients that are added to them."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

from model.layers.products import add_product, product
from tests.gpu.test_gpu_numerics import needs
from tests.gpu.test_gpu_training import run_config, train

pytestmark = pytest.mark.gpu
STEPS = 6
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "kernels": "local"},
    "bf16": {"precision": "bf16", "kernels": "local"},
    "graph": {"precision": "bf16", "kernels": "local", "cuda_graph": True},
    "joined": {"precision": "bf16", "kernels": "local_joined"},
    "joined fp32": {"precision": "fp32", "kernels": "local_joined"},
    "joined graph": {"precision": "bf16", "kernels": "local_joined", "cuda_graph": True},
}
"""Joined kernels add gradients of vectors to their sums, too."""
OF_TE: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16", "kernels": "te"},
    "graph": {"precision": "bf16", "kernels": "te", "cuda_graph": True},
    "recomputed": {"precision": "bf16", "kernels": "te", "recompute": {"granularity": "full"}},
    "fp8": {"precision": "bf16", "kernels": "te", "fp8": {"recipe": "delayed"}},
}


@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_product_adds_to_a_sum_in_fp32(dtype: torch.dtype, factor: float) -> None:
    """In place, and not rounded to 16 bits."""
    torch.manual_seed(0)
    a, b = (torch.randn(96, width, device="cuda", dtype=dtype) for width in (48, 80))
    total = torch.randn(48, 80, device="cuda")
    expected, place = total.double() + factor * (a.double().t() @ b.double()), total.data_ptr()
    add_product(total, a.t(), b, factor)
    assert (total.dtype, total.data_ptr()) == (torch.float32, place)
    assert float((total.double() - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_inside_of_products_are_as_exact_as_apart(dtype: torch.dtype) -> None:
    """In fp64 by PyTorch's operators; at sizes of many tiles and at odd ones."""
    from model.layers.product_pass import feed_pass
    from tests.model.layers.join_worker import error
    from tests.model.layers.product_worker import FUNCTIONS, by_parts, results_and_gradients

    kinds = list(FUNCTIONS) if dtype == torch.bfloat16 else ["gelu"]
    for number, (kind, gated) in enumerate(itertools.product(kinds, (False, True))):
        # Each is compiled anew, a second at a time.
        widths = ((520, 1304), (131, 257))[number // 2 % 2 ^ gated]
        ours, parts = (
            error(
                *results_and_gradients(
                    kind,
                    dtype,
                    widths,
                    gated=gated,
                    biased=gated,
                    feed=feed,
                    device="cuda",
                    rows=(401, 3),
                )
            )
            for feed in (feed_pass, by_parts)
        )
        assert ours < 1.5 * parts + 1e-6, (kind, gated, widths)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_activations_inside_of_products_train_alike(graph: bool) -> None:
    fields: dict[str, Any] = {"precision": "bf16", "kernels": "local_joined", "cuda_graph": graph}
    apart, inside = (train(run_config(activation_in_product=on, **fields), STEPS)[0] for on in (False, True))
    assert inside[0] == pytest.approx(apart[0], rel=1e-3)
    assert inside == pytest.approx(apart, rel=2e-2)


def test_a_branch_ends_in_the_residual() -> None:
    torch.manual_seed(0)
    x, weight, onto = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in ((64, 2, 48), (80, 48), (64, 2, 80))
    )
    total = torch.zeros(80, 48, device="cuda")
    stream = product(x, weight, None, onto, 0.37, total)
    stream.float().sum().backward()
    wide = [one.detach().double().requires_grad_() for one in (x, weight, onto)]
    (wide[2] + 0.37 * (wide[0] @ wide[1].t())).sum().backward()
    for ours, theirs in zip((x.grad, total, onto.grad), (one.grad for one in wide), strict=True):
        assert ours is not None
        assert theirs is not None
        assert float((ours.double() - theirs).abs().max() / theirs.abs().max()) < 2.0**-7


def check(fields: dict[str, Any]) -> None:
    """Sums of gradients in bf16 are rounded once a micro-batch, those of products are not."""
    apart, fused = (
        train(run_config(gradient_accumulation_fusion=on, **fields), STEPS)[0] for on in (False, True)
    )
    assert fused[0] == pytest.approx(apart[0], rel=1e-6)
    assert fused == pytest.approx(apart, rel=2e-2)


@pytest.mark.parametrize("kind", list(KINDS))
def test_local_kernels_train_alike(kind: str) -> None:
    check(KINDS[kind])


@pytest.mark.te
@pytest.mark.parametrize("kind", list(OF_TE))
def test_transformer_engine_trains_alike(kind: str) -> None:
    if kind == "fp8":
        needs("delayed")
    check(OF_TE[kind])
