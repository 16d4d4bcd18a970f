"""Frequencies of rotary embeddings against their published equations and transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig
from model.rotary import frequencies, magnitude
from tests.model.hf.tiny import make_config, rotation

LLAMA3 = {"scaling": "llama3", "factor": 8.0, "original_positions": 64}
YARN = {"scaling": "yarn", "factor": 4.0, "original_positions": 256}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"scaling": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, other limits": {**LLAMA3, "low_frequency": 2.0, "high_frequency": 3.0},
    "yarn": YARN,
    "yarn, part of a head": {**YARN, "share": 0.5, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, another factor": {**YARN, "attention_factor": 1.5},
}
THEIRS = {
    "original_positions": "original_max_position_embeddings",
    "scaling": "rope_type",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "share": "partial_rotary_factor",
}


def config_of(**rotary: Any) -> ModelConfig:
    return make_config(head_dim=32, position="rotary", rotary=rotary)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_the_published_ones(name: str) -> None:
    config = config_of(**SCALINGS[name])
    expected, factor = rotation(config)
    assert expected is not None
    torch.testing.assert_close(frequencies(config, dtype=torch.float64), expected, rtol=1e-13, atol=0)
    assert magnitude(config) == pytest.approx(factor, rel=1e-15)
    plain = frequencies(config_of(share=config.rotary.share), dtype=torch.float64)
    assert len(set((plain / expected).tolist())) > (name != "linear")


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    config = config_of(**SCALINGS[name])
    read = {**config.rotary.model_dump(), **SCALINGS[name]}
    rope = {THEIRS.get(key, key): value for key, value in read.items() if value is not None}
    theirs = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=32, rope_parameters={**rope, "rope_theta": 10000.0}
    )
    expected, factor = ROPE_INIT_FUNCTIONS[config.rotary.scaling](theirs, "cpu")
    torch.testing.assert_close(frequencies(config), expected, rtol=1e-6, atol=0)
    assert magnitude(config) == pytest.approx(factor, rel=1e-12)


def test_layers_with_a_base_of_their_own_are_not_scaled() -> None:
    config = make_config(
        position="rotary", rotary=LLAMA3, window=2, global_every=2, rotary_base_local=50, num_layers=4
    )
    plain = make_config(position="rotary", rotary_base=50)
    assert torch.equal(frequencies(config, local=True), frequencies(plain))
    yarn = config.model_copy(update={"rotary": config_of(**YARN).rotary})
    assert (magnitude(yarn) > 1, magnitude(yarn, local=True)) == (True, 1.0)


@pytest.mark.parametrize(
    ("rotary", "problem"),
    [
        ({"factor": 2.0}, "model.rotary.factor=2.0 has no effect with model.rotary.scaling=none"),
        ({"scaling": "linear"}, "scaling=linear needs model.rotary.factor"),
        ({"scaling": "yarn", "factor": 2.0}, "scaling=yarn needs model.rotary.original_positions"),
        ({**LLAMA3, "beta_fast": 3.0}, "model.rotary.beta_fast=3.0 has no effect"),
        ({**LLAMA3, "low_frequency": 5.0}, "low_frequency=5.0 must be below model.rotary.high_frequency=4.0"),
        ({"share": 0.1}, "model.rotary.share=0.1 turns 3 of 32 entries of a head"),
    ],
)
def test_settings_that_make_no_rotation_are_refused(rotary: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        config_of(**rotary)


@pytest.mark.parametrize("rotary", [{"share": 0.5}, LLAMA3])
def test_without_rotary_positions_they_have_no_effect(rotary: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.rotary\.\w+ has no effect with model\.position=learned"):
        make_config(rotary=rotary)
