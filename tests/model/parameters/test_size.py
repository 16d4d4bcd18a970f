"""Parameter counts against numbers counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.parameters.size import parameter_count

H, L, V, P = 8, 3, 128, 16
LINEAR = (
    4 * H * H + 4 * H + 2 * 4 * H * H + 5 * H
)  # qkv and proj with biases; fc1 and fc2 of width 4h with biases


def config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "num_layers": L,
        "hidden_size": H,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": P,
    }
    return ModelConfig(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("scheme", "norms"),
    [
        ("pre_ln", 2 * L + 1),
        ("post_ln", 2 * L),
        ("b2t", 2 * L),
        ("deepscalelm_pre_ln", 2 * L + 1),
        ("deepscalelm_post_ln", 2 * L + 1),
        ("deepnorm", 2 * L),
        ("layernorm_scaling", 2 * L + 1),
        ("peri_ln", 4 * L + 2),
        ("mix_ln", 2 * L + 1),
        ("spannorm", 2 * L + 1),
        ("keel", 4 * L - 1),
        ("gpas", 2 * L + 1),
        ("hybridnorm", L + 1),
        ("subln", 7 * L + 1),  # one of them over the hidden layer of the feed-forward, 4 H wide
    ],
)
def test_every_scheme_against_its_norms_counted_by_hand(scheme: str, norms: int) -> None:
    counts = parameter_count(config(scheme=scheme))
    gates = L if scheme == "gpas" else 0
    heads = 3 * L * 2 * H // 2 if scheme == "hybridnorm" else 0  # of two heads' queries, keys, values
    assert (counts["norms"], counts["gates"]) == (norms * 2 * H + heads, gates)
    assert counts["total"] == V * H + P * H + L * LINEAR + norms * 2 * H + heads + gates


def test_the_table_above_names_all_schemes() -> None:
    mark = next(mark for mark in test_every_scheme_against_its_norms_counted_by_hand.pytestmark)  # type: ignore[attr-defined]
    assert {scheme for scheme, _ in mark.args[1]} == set(SCHEMES)


def test_grouped_queries_gate_rmsnorm_no_bias_rotary_untied() -> None:
    changed = config(
        scheme="pre_ln",
        num_query_groups=1,
        head_dim=6,
        ffn_hidden_size=24,
        activation="swiglu",
        normalization="rmsnorm",
        bias=False,
        position="rotary",
        tie_embeddings=False,
    )
    assert parameter_count(changed) == {
        "word_embeddings": V * H,
        "position_embeddings": 0,
        "attention": L * ((2 + 2) * 6 * H + H * 12),
        "mlp": L * (48 * H + H * 24),
        "norms": (2 * L + 1) * H,
        "gates": 0,
        "output_layer": V * H,
        "total": 2 * V * H + L * (24 * H + 12 * H + 72 * H) + (2 * L + 1) * H,
    }


def test_gpt2_small_has_its_known_size() -> None:
    """124 439 808 parameters with the unpadded vocabulary, as published."""
    gpt2 = config(
        scheme="pre_ln",
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=50257,
        vocab_multiple=1,
        max_position_embeddings=1024,
    )
    assert parameter_count(gpt2)["total"] == 124_439_808


@pytest.mark.parametrize("missing", ["vocab_size", "max_position_embeddings"])
def test_unknown_sizes_are_refused_by_name(missing: str) -> None:
    with pytest.raises(UserError, match=f"model.{missing} is not known"):
        parameter_count(config(**{missing: None}))
