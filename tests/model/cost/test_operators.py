"""Operators that are noted one by one, by hand on a few of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.cost.operators import Counting, GpuKernels, Kept, backward, table


def test_bytes_are_those_of_distinct_tensors() -> None:
    a, b = torch.ones(4, 8), torch.ones(8)
    with Counting("cpu") as counting:
        twice = a + a
        twice.add_(b.expand(4, 8))  # a row that is repeated lies in memory once
        twice.view(8, 4).t().zero_()
    found = [(one.name, one.kind, one.read, one.written) for one in counting.operators]
    assert found == [
        ("add", "sums", 4 * 32, 4 * 32),
        ("add_", "sums", 4 * (32 + 8), 4 * 32),
        ("zero_", "fills", 0, 4 * 32),
    ]
    row = {"forward": 2, "backward": 0, "accumulate": 0, "kernels": 2, "read": 288, "written": 256}
    assert table(counting.operators)["sums"] == row


def test_products_have_operations_and_gradients_their_own_phase() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.ones(3, 8)
    total = torch.zeros(4, 8)
    layer.weight.grad = total
    with Counting("cpu", [total]) as counting:
        out: Tensor = layer(x)
        counting.phase = "backward"
        backward([out], [torch.ones_like(out)])
    found = [(one.name, one.phase, one.flops) for one in counting.operators if one.name != "ones_like"]
    flops = 2 * 3 * 8 * 4
    assert found == [("mm", "forward", flops), ("mm", "backward", flops), ("add_", "accumulate", 0)]
    assert total.eq(3).all()


def test_an_operator_without_a_kind_is_named() -> None:
    with pytest.raises(LookupError, match="operator aten.erfinv.default has no kind"), Counting("cpu"):
        torch.zeros(2).erfinv()


@pytest.mark.parametrize("function", ["rms_norm", "dropout", "scaled_dot_product_attention"])
def test_on_meta_there_are_the_kernels_of_a_gpu(function: str) -> None:
    """One forward and one backward, which keep what Fathom says that a GPU keeps."""
    q = torch.empty(2, 4, 16, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    gain = torch.empty(8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    arguments = {
        "rms_norm": ((q, (8,), gain, 1e-5), 2048 + 4 * 128),
        "dropout": ((q, 0.1), 1024),
        # Its input three times over is one tensor; the output, a sum of each row, random states.
        "scaled_dot_product_attention": ((q, q, q), 2048 + 2048 + 4 * 128 + 24),
    }
    given, expected = arguments[function]
    kept = Kept([gain])
    with GpuKernels(), Counting() as counting:
        with kept:
            out = getattr(torch.nn.functional, function)(*given)
        counting.phase = "backward"
        backward([out], [torch.empty_like(out)])
    phases = [one.phase for one in counting.operators if one.kind != "sums" and one.kind != "fills"]
    assert phases == ["forward", "backward"]
    assert kept.bytes == expected
