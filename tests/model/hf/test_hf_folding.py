"""Folding into stock architectures.

It is exact up to one epsilon, at any depth, and decided from the plan alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.depth.plan import DepthPlan
from model.depth.schemes import SCHEMES
from model.depth.sublayer import Layer, Sublayer
from model.hf.folding.obstacles import obstacle
from model.hf.folding.pre_ln import Fold, fold, pre_ln_obstacle, shared_epsilon
from model.hf.names.conversions import Target
from model.hf.proof import Inputs, change, epsilon_effect
from model.hf.reference import Evaluation
from tests.model.hf.tiny import make_config, make_tokens, make_weights, reference

LLAMA = {
    "normalization": "rmsnorm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "num_query_groups": 2,
}


@pytest.mark.parametrize("scheme", ["pre_ln", "layernorm_scaling", "deepscalelm_pre_ln"])
@pytest.mark.parametrize("depth", [12, 48])
@pytest.mark.parametrize("target", ["gpt2", "llama"])
def test_folded_weights_in_a_plain_pre_ln_model_give_the_same_logits(
    scheme: str, depth: int, target: Target
) -> None:
    """In fp64, with each norm's epsilon as the fold says: nothing but the algebra is left."""
    config = make_config(scheme, num_layers=depth, **(LLAMA if target == "llama" else {}))
    weights, tokens = make_weights(config), make_tokens(config)
    assert obstacle(target, config) is None
    plan = fold(target, config, 0.3)
    folded = {name: tensor.double() * plan.factors.get(name, 1.0) for name, tensor in weights.items()}
    stock = config.model_copy(update={"scheme": "pre_ln", "norm_epsilon": plan.epsilon})
    ours = Evaluation(weights, config, logit_scale=0.3, dtype=torch.float64, epsilons=plan.epsilons)(tokens)
    assert change(Evaluation(folded, stock, logit_scale=1.0, dtype=torch.float64)(tokens), ours) < 1e-10
    # And the fold's epsilons are all that separates it from the published equations.
    effect = epsilon_effect(weights, config, Inputs(tokens), 0.3, plan)
    assert change(ours, reference(config, weights, 0.3, torch.float64)(tokens)[..., :101]) == pytest.approx(
        effect, abs=1e-10
    )
    assert effect < 2e-4
    assert (effect == 0) is (scheme != "deepscalelm_pre_ln")


def test_pre_ln_needs_no_factor() -> None:
    assert fold("gpt2", make_config("pre_ln"), 1.0) == Fold({}, 1e-5)
    assert set(fold("gpt2", make_config("pre_ln"), 0.5).factors) == {
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias",
    }


def test_factors_of_two_layers_by_hand() -> None:
    config = make_config("deepscalelm_pre_ln", num_layers=2, scheme_options={"k": 1.0, "alpha": 1.0})
    lam, beta = 0.75**0.5, 0.25**0.5
    factors = fold("gpt2", config, 1.0).factors
    for j, name in enumerate(
        (
            "0.self_attention.linear_proj",
            "0.mlp.linear_fc2",
            "1.self_attention.linear_proj",
            "1.mlp.linear_fc2",
        ),
        start=1,
    ):
        for leaf in ("weight", "bias"):
            assert factors[f"decoder.layers.{name}.{leaf}"] == pytest.approx(beta / lam**j)
    assert len(factors) == 8


def test_a_thousand_layers_fold_without_rounding() -> None:
    """A factor rounded to fp32 is off by 6e-5 after 2000 sublayers.

    Neither the fold nor the evaluation in fp32 has that.
    """
    config = make_config(
        "deepscalelm_pre_ln", num_layers=1000, hidden_size=8, num_attention_heads=1, ffn_hidden_size=8
    )
    lam, beta = (1 - 1 / 1000) ** 0.5, (1 / 1000) ** 0.5
    last = fold("gpt2", config, 1.0).factors["decoder.layers.999.mlp.linear_fc2.weight"]
    assert last == pytest.approx(beta / lam**2000, rel=1e-10)
    weights, tokens = make_weights(config), make_tokens(config)
    single, exact = (
        Evaluation(weights, config, logit_scale=1.0, dtype=dtype)(tokens)
        for dtype in (torch.float32, torch.float64)
    )
    assert change(single, exact) < 2e-5


def test_factors_beyond_the_range_of_a_fold_are_found() -> None:
    config = make_config("deepscalelm_pre_ln", num_layers=100, scheme_options={"k": 190.0})
    assert "more than a fold can hold" in str(obstacle("gpt2", config))


def test_the_shared_epsilon_has_the_smallest_largest_error() -> None:
    scales = [1.0, 0.9, 0.5, 0.37]

    def worst(epsilon: float) -> float:
        return max(abs(epsilon * c**2 - 1e-5) for c in scales)

    best = shared_epsilon(1e-5, scales)
    assert all(worst(best) <= worst(best * factor) for factor in (0.9, 0.99, 1.01, 1.1))


@pytest.mark.parametrize(
    ("change_of_sublayer", "reason"),
    [
        ({"norm_branch": True}, "norm after its branch"),
        ({"norm_out": True}, "norm after the residual sum"),
        ({"residual_from_norm": True}, "residual after a norm"),
        ({"skip_scale": 1.0}, "a second time"),
        ({"residual_scale": 0.0}, "scales its residual by 0.0"),
        ({"residual_scale": -1.0}, "scales its residual by -1.0"),
        ({"norm_in": False}, "no norm before its branch"),
    ],
)
def test_any_single_departure_from_the_form_is_found(
    change_of_sublayer: dict[str, bool | float], reason: str
) -> None:
    good = Sublayer(norm_in=True, residual_scale=0.9, branch_scale=0.3, input_scale=0.7)
    bad = replace(good, **change_of_sublayer)  # type: ignore[arg-type]
    assert pre_ln_obstacle(DepthPlan((Layer(good, good), Layer(good, good)), False, True)) is None
    found = pre_ln_obstacle(DepthPlan((Layer(good, good), Layer(good, bad)), False, True))
    assert found is not None
    assert reason in found
    assert "mlp sublayer of layer 2" in found


def test_which_schemes_fold_today() -> None:
    assert {name for name in SCHEMES if pre_ln_obstacle(make_config(name).depth_plan()) is None} == {
        "pre_ln",
        "deepscalelm_pre_ln",
        "layernorm_scaling",
    }


def test_mix_ln_without_its_post_part_is_pre_ln() -> None:
    """The decision is by data: a scheme's name does not matter."""
    assert obstacle("gpt2", make_config("mix_ln", scheme_options={"post_fraction": 0.0})) is None
