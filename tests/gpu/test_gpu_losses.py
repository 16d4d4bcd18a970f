"""Losses of libraries that take the output projection along, on a GPU, against our own."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from model.network.fused_losses import liger_losses, torch_losses
from tests.model.network.fused_models import CAPPED, CASES, errors
from tests.model.network.test_fused_losses import has_torch

pytestmark = pytest.mark.gpu
has_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="Liger-Kernel is not installed"
)
EXTRAS: dict[str, Any] = {"smoothing": 0.1, "z_loss": 0.02}
# In fp32 sums of products have another order. In bf16 products of a part of the rows round some
# logits the other way: by 2^-8 of up to ten.
LIMITS = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (0.1, 0.1)}


def check(found: dict[str, float], dtype: torch.dtype) -> None:
    losses, gradients = LIMITS[dtype]
    assert found["losses"] < losses
    assert found["evaluated"] < losses
    assert found["gradients"] < gradients


@has_liger
@pytest.mark.parametrize("dtype", list(LIMITS), ids=["fp32", "bf16"])
@pytest.mark.parametrize("fields", [*CASES.values(), CAPPED], ids=[*CASES, "capped"])
def test_liger_computes_the_same(fields: dict[str, Any], dtype: torch.dtype) -> None:
    check(errors(liger_losses, fields, dtype, device="cuda", **EXTRAS), dtype)


@has_torch
def test_torch_computes_the_same() -> None:
    check(errors(torch_losses, {}, torch.float32, device="cuda", chunk=5), torch.float32)
