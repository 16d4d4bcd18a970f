"""Tokens are compared within their texts, and padding is none."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from pretrain.probe.places import Places, places_of


def test_correlation_of_equal_and_of_opposite_tokens() -> None:
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(5, 1, 8)
    assert Places().correlation(x) == pytest.approx(1.0)
    assert Places().correlation(torch.cat([x[:1], -x[:1]])) == pytest.approx(-1.0)
    assert Places().correlation(torch.zeros(5, 1, 8)) == 0.0


def test_coincidence_counts_pairs() -> None:
    tokens = torch.tensor([[1, 1, 2, 3], [4, 4, 4, 4]])
    assert Places().coincidence(tokens) == pytest.approx((2 / 12 + 12 / 12) / 2)
    texts = torch.tensor([[1, 1, 2, 0], [1, 1, 2, 2]])
    assert Places(texts).coincidence(tokens) == 1.0
    assert Places(torch.tensor([[1, 2, 2, 2], [0, 0, 1, 2]])).coincidence(tokens) == 0.0


def test_texts_are_counted_and_a_row_of_padding_is_none() -> None:
    places = Places(torch.tensor([[1, 1, 2, 0], [0, 0, 0, 0], [1, 2, 3, 3]]))
    assert places.texts_in_a_row == pytest.approx(5 / 3)
    assert places.mean_length == pytest.approx(7 / 5)
    assert Places().mean_length is None


def test_a_decoders_first_text_is_no_padding() -> None:
    """Windows of a stream of documents begin in one of number 0, and have no padding."""
    config = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8)
    (found,) = places_of(config, {"documents": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])})
    assert found.mean_length == pytest.approx(8 / 5)
