"""What the depth schemes promise about signals at initialisation, measured in the real model.

Forward variance, late-token gradients, closed forms.
Width 128, 4 heads, 2 sequences of 128 Zipf tokens a seed (vocabulary 4096).
Dropout 0.1, ReLU, float32 unless said otherwise.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.theory import fixed_point, relu_kappa
from parallel.launch.one_process import single_process
from pretrain.config.scheme_choice import parse_variant
from pretrain.data.samples import next_tokens
from pretrain.probe.measure import probe, zipf_tokens
from pretrain.probe.records import Probe
from pretrain.tasks.causal_lm import CAUSAL_LM

VOCAB, LENGTH, BATCH = 4096, 128, 2
SEEDS = (1234, 1235, 1236)


@cache
def measured(scheme: str, layers: int, seeds: tuple[int, ...] = SEEDS, double: bool = False) -> Probe:
    model = ModelConfig(
        num_layers=layers,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        activation="relu",
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    return probe(
        parse_variant(scheme).apply(model),
        single_process(),
        seq_length=LENGTH,
        task=CAUSAL_LM,
        batches=lambda seed: next_tokens(zipf_tokens(VOCAB, BATCH, LENGTH + 1, seed)),
        seeds=seeds,
        dtype=torch.float64 if double else torch.float32,
    )


def late_ratio(scheme: str, layers: int, seeds: tuple[int, ...] = SEEDS, double: bool = False) -> float:
    """Gradient variance of late tokens at layer 1 over that at the last layer."""
    return measured(scheme, layers, seeds, double).layers[0].grad_variance_late


def depths(quick: int, *slow: int) -> list[object]:
    return [quick, *(pytest.param(layers, marks=pytest.mark.slow) for layers in slow)]


# ---- DeepScaleLM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", depths(96, 192, 1000))
def test_deepscalelm_pre_ln_keeps_the_forward_variance_at_one_in_every_layer(layers: int) -> None:
    forward = measured("deepscalelm_pre_ln", layers).values("forward_variance")
    assert min(forward) > 0.9
    assert max(forward) < 1.1


@pytest.mark.parametrize("layers", depths(96, 192))
def test_the_gain_as_published_overshoots_in_a_decoder(layers: int) -> None:
    forward = measured("deepscalelm_pre_ln:init.causal_correction=false", layers).values("forward_variance")
    assert max(forward) > 1.2


@pytest.mark.parametrize("layers", depths(48, 192, 1000))
@pytest.mark.parametrize("scheme", ["deepscalelm_pre_ln", "deepscalelm_post_ln"])
def test_deepscalelm_keeps_the_late_gradient_between_its_bounds(scheme: str, layers: int) -> None:
    k = float(SCHEMES[scheme].options["k"])
    assert math.exp(-k / 2) <= late_ratio(scheme, layers) <= 1.5


def test_a_larger_k_costs_gradient_as_the_bound_says() -> None:
    assert (
        math.exp(-2) <= late_ratio("deepscalelm_pre_ln:k=4", 48) < 0.8 * late_ratio("deepscalelm_pre_ln", 48)
    )


@pytest.mark.parametrize("layers", depths(48, 192))
def test_theory_predicts_what_is_measured(layers: int) -> None:
    for layer in measured("deepscalelm_pre_ln", layers).layers:
        assert layer.forward_variance == pytest.approx(layer.forward_variance_theory, abs=0.12)
        assert layer.token_correlation == pytest.approx(layer.token_correlation_theory, abs=0.08)
        assert layer.grad_variance_late == pytest.approx(layer.grad_variance_late_theory, abs=0.15)


# ---- B2T and post-LN -----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", depths(48, 192))
def test_rescaled_b2t_keeps_the_late_gradient(layers: int) -> None:
    assert late_ratio("b2t", layers) > 0.85


@pytest.mark.parametrize("layers", depths(48, 192))
def test_rescaled_post_ln_is_as_flat_as_b2t_at_the_start(layers: int) -> None:
    assert late_ratio("post_ln:rescale=true:init.base=fairseq", layers) == pytest.approx(
        late_ratio("b2t", layers), abs=0.05
    )


@pytest.mark.parametrize(
    "scheme",
    ["post_ln:branch=1", "b2t:branch=2:init.base=xavier", "deepscalelm_post_ln:alpha=2:k=4"],
)
def test_branches_of_one_nth_keep_the_late_gradient_level(scheme: str) -> None:
    """A constant sum of the branches over the depth costs a constant, whatever the depth."""
    assert 0.9 < late_ratio(scheme, 48) < 1.2


def test_b2t_without_rescaling_loses_some_at_18_layers_where_post_ln_loses_nearly_all() -> None:
    assert 0.5 < late_ratio("b2t:rescale=false", 18) < 0.9
    assert late_ratio("post_ln:init.base=fairseq", 18) < 0.05


@pytest.mark.parametrize("layers", depths(48, 192))
def test_post_ln_vanishes_at_the_rate_of_the_theory(layers: int) -> None:
    """In float64, because at 192 layers 1e-52 is left."""
    signals = measured("post_ln", layers, SEEDS[:1], True)
    assert signals.layers[0].log10_grad_variance_late < -0.2 * layers
    per_layer = signals.layers[0].log10_grad_variance_late / (layers - 1)
    theory = math.log10(signals.layers[0].grad_variance_late_theory or math.nan) / (layers - 1)
    assert per_layer == pytest.approx(theory, abs=0.03)


# ---- pre-LN --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", depths(48, 192))
def test_pre_ln_grows_linearly(layers: int) -> None:
    forward = measured("pre_ln", layers).values("forward_variance")
    assert forward[-1] / forward[layers // 2 - 1] == pytest.approx(2.0, abs=0.25)
    assert forward[-1] > 0.7 * layers


# ---- closed forms --------------------------------------------------------------------------------


def test_closed_forms() -> None:
    assert relu_kappa(0.0) == pytest.approx(1 / math.pi, abs=1e-12)
    assert relu_kappa(1.0) == 1.0
    assert fixed_point("relu", 0.1) == pytest.approx(0.8348, abs=5e-5)
    branch = SCHEMES["deepscalelm_pre_ln"].plan(192)[0].mlp.branch_scale
    assert branch**2 == pytest.approx(0.00521, abs=5e-6)
    assert branch**2 == pytest.approx(2 / 384, abs=1e-12)
