"""Which parameters read which factors, and factors that would have no effect."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from model.config import ModelConfig
from model.parameters.table import parameter_table
from pretrain.config.sections.factors import FactorsConfig, factors_of, role_of
from tests.parallel.training import given, run_config

LAST = "decoder.layers.3.mlp_output_norm"


def stream_norms(scheme: str) -> set[str]:
    """Modules of the norms that read `stream_norm`."""
    config = ModelConfig(scheme=scheme, num_layers=4, hidden_size=32, num_attention_heads=4, vocab_size=8)
    rows = parameter_table(config, positions=8)
    return {row.name.rpartition(".")[0] for row in rows if role_of(row) == "stream_norm"}


def in_layers(*modules: str) -> set[str]:
    return {f"decoder.layers.{layer}.{module}" for layer in range(4) for module in modules}


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("pre_ln", set()),
        ("deepscalelm_pre_ln", set()),
        ("peri_ln", set()),
        ("post_ln", in_layers("pre_mlp_layernorm", "mlp_output_norm") - {LAST}),
        ("b2t", in_layers("pre_mlp_layernorm", "mlp_output_norm") - {LAST}),
        ("mix_ln", {"decoder.layers.0.pre_mlp_layernorm", "decoder.layers.0.mlp_output_norm"}),
        ("spannorm", in_layers("mlp_output_norm") - {LAST}),
    ],
)
def test_norms_of_the_stream_are_those_it_passes(scheme: str, expected: set[str]) -> None:
    assert stream_norms(scheme) == expected


def test_words_follow_the_size_of_the_model() -> None:
    model = ModelConfig(scheme="post_ln", num_layers=100, hidden_size=64, num_attention_heads=4, vocab_size=8)
    factors = FactorsConfig.model_validate(
        given(
            embedding=given(rate="sqrt(hidden)"),
            stream_norm=given(rate="1/layers"),
            bias=given(rate="1/sqrt(layers)"),
        )
    )
    of = factors_of(factors, model)
    rates = {role_of(row): of(row).rate for row in parameter_table(model, positions=8)}
    assert rates == {"embedding": 8.0, "stream_norm": 0.01, "bias": 0.1, "norm": 1.0, "hidden": 1.0}
    assert math.isclose(rates["embedding"] ** 2, model.hidden_size)


@pytest.mark.parametrize(
    ("model", "optimizer", "text"),
    [
        (given(scheme="pre_ln"), given(factors=given(stream_norm=given(rate=0.5))), "norms on its branches"),
        ({}, given(factors=given(output=given(rate=0.5))), "tie_embeddings=true"),
        (given(bias=False), given(factors=given(bias=given(rate=0.5))), "model.bias=false"),
        ({}, given(factors=given(norm=given(decay=0.5))), "only matrices are decayed"),
        ({}, given(factors=given(embedding=given(decay=0.5))), "decay_embeddings=false"),
        ({}, given(kind="muon", factors=given(hidden=given(eps=0.5))), "has no epsilon"),
        ({}, given(factors=given(hidden=given(rate="1/depth"))), "hidden.rate"),
        ({}, given(factors=given(hidden=given(rate=0.0))), "hidden.rate"),
    ],
)
def test_a_factor_without_effect_is_refused(
    model: dict[str, Any], optimizer: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValidationError, match=text.replace(".", r"\.")):
        run_config(model, **optimizer)
