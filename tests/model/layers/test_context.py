"""Sequences cut in a zigzag, and causal attention of the last queries of one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.layers.context import causal_tail, own_pieces, places


def test_ranks_share_a_sequence_and_its_causal_work() -> None:
    length, ranks = 48, 3
    own = [places(length, rank, ranks) for rank in range(ranks)]
    assert torch.cat(own).sort().values.tolist() == list(range(length))
    assert len({int((part + 1).sum()) for part in own}) == 1, "a query sees as many keys as its place says"
    values = torch.randn(2, length, 3)
    assert all(own_pieces(values, 1, rank, ranks).equal(values[:, own[rank]]) for rank in range(ranks))
    assert all((part.diff() > 0).all() for part in own)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_last_queries_see_what_a_mask_would_show_them(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int, length: int) -> torch.Tensor:
        shape = (2, heads, length, 8)
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    query, key, value = drawn(4, 5), drawn(groups, 17), drawn(groups, 17)
    mask = torch.ones(5, 17, dtype=torch.bool).tril(12)
    out = causal_tail(query, key, value, scale=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=groups < 4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(out, (query, key, value), weight),
        torch.autograd.grad(expected, (query, key, value), weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
