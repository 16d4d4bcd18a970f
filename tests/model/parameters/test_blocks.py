"""Matrices that share a tensor: where their rows are, and the way there and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters.blocks import Blocks
from model.parameters.table import qkv_blocks

GATE_UP = Blocks((("fc1", 1), ("fc1", 1)))


def config() -> ModelConfig:
    return ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=4, num_query_groups=2, head_dim=3)


def numbered(rows: int, columns: int = 2) -> Tensor:
    """Each row holds its number."""
    return torch.arange(rows).unsqueeze(1).expand(rows, columns).contiguous()


def test_a_group_holds_its_queries_its_key_and_its_value() -> None:
    # 2 groups of 2 query heads, a key and a value of 3 rows each.
    q, k, v = qkv_blocks(config()).split(numbered(24))
    assert q[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert k[:, 0].tolist() == [6, 7, 8, 18, 19, 20]
    assert v[:, 0].tolist() == [9, 10, 11, 21, 22, 23]
    assert v.shape == (6, 2)


@pytest.mark.parametrize("blocks", [qkv_blocks(config()), GATE_UP, Blocks((("o", 1),))])
@pytest.mark.parametrize("shape", [(24, 2), (24,)])
def test_split_and_join_are_inverse(blocks: Blocks, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blocks.join(blocks.split(whole)), whole)
    assert blocks.rows(len(whole)) == tuple(len(one) for one in blocks.split(whole))


def test_views_write_into_the_tensor() -> None:
    whole = torch.zeros(24, 2)
    for number, view in enumerate(qkv_blocks(config()).views(whole)):
        view.fill_(number)
    assert whole[:, 1].tolist() == ([0] * 6 + [1] * 3 + [2] * 3) * 2


def test_gate_and_up_are_two_matrices_of_one_role() -> None:
    whole = numbered(10)
    gate, up = GATE_UP.split(whole)
    assert (gate[:, 0].tolist(), up[:, 0].tolist()) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert GATE_UP.roles == ("fc1",)
    assert GATE_UP.by_role(whole)["fc1"] is whole


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="25 rows"):
        qkv_blocks(config()).views(numbered(25))
