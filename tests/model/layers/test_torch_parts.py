"""Parts of the layer without Transformer Engine.

What is done differently for speed gives the same numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers import torch_parts
from model.stack import Stack
from parallel.launch.one_process import single_process

TOKENS = 200


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_query_groups": 2}, {"causal": False}],
    ids=["causal", "grouped", "bidirectional"],
)
def test_attention_over_copied_heads(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    single_process()
    torch.manual_seed(0)
    stack = Stack("pre_ln", num_layers=2, hidden_size=32, num_attention_heads=4, dtype=torch.float64, **shape)
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    in_one_piece: list[bool] = []
    attention = F.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        in_one_piece.append(query.is_contiguous() and key.is_contiguous() and value.is_contiguous())
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    x_bsh = torch.randn(2, TOKENS, 32, dtype=torch.float64)

    def outcome(copied_from: int) -> tuple[Tensor, list[Tensor]]:
        monkeypatch.setattr(torch_parts, "COPIED_FROM", copied_from)
        in_one_piece.clear()
        stack.zero_grad()
        y_bsh = stack(x_bsh)
        y_bsh.square().sum().backward()
        assert in_one_piece == [copied_from <= TOKENS] * 2
        return y_bsh.detach(), [
            parameter.grad.clone() for parameter in stack.parameters() if parameter.grad is not None
        ]

    (copied, gradients), (in_place, expected) = outcome(TOKENS), outcome(TOKENS + 1)
    torch.testing.assert_close(copied, in_place, rtol=1e-12, atol=1e-12)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))
