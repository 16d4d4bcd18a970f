"""Post-LN models as OPT.

The algebra in float64, in the class that users get, at any epsilon and around the stack.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from model.config import ModelConfig
from model.depth.plan import DepthPlan
from model.depth.scheme import Scheme
from model.depth.schemes import SCHEMES
from model.depth.sublayer import Layer, Sublayer
from model.hf.folding.obstacles import obstacle
from model.hf.folding.post_ln import post_ln_factors, post_ln_obstacle
from model.hf.folding.pre_ln import Fold, fold
from model.hf.mapping import entries
from model.hf.names.conversions import OPT_EPSILON
from model.hf.proof import change
from model.hf.reference import Evaluation
from model.hf.settings.write import write_config
from tests.model.hf.tiny import POSITIONS, make_config, make_tokens, make_weights

SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
MIX: dict[str, Any] = {"scheme": "mix_ln", "scheme_options": {"post_fraction": 1.0}}


def opt_in_float64(
    config: ModelConfig, weights: dict[str, Tensor], plan: Fold, logit_scale: float
) -> OPTForCausalLM:
    """The export without any rounding of weights or arithmetic."""
    settings = write_config(
        "opt", config, plan, positions=POSITIONS, logit_scale=logit_scale, dtype="float64", special=SPECIAL
    )
    model = OPTForCausalLM(OPTConfig(**settings)).double().eval()
    state: dict[str, Tensor] = {}
    for entry in entries("opt", config, POSITIONS):
        exact = (
            weights[entry.canonical].double()
            if entry.constant is None
            else torch.zeros(entry.shape, dtype=torch.float64) + entry.constant
        )
        state |= dict(
            zip(
                entry.hf,
                entry.conversion.to_hf(exact * plan.factors.get(entry.canonical, 1.0), config),
                strict=True,
            )
        )
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def difference(config: ModelConfig, logit_scale: float = 0.3) -> float:
    """Between an OPT and our equations."""
    assert obstacle("opt", config) is None
    weights, tokens = make_weights(config), make_tokens(config)
    ours = Evaluation(weights, config, logit_scale=logit_scale, dtype=torch.float64)(tokens)
    with torch.no_grad():
        return change(
            opt_in_float64(config, weights, fold("opt", config, logit_scale), logit_scale)(tokens).logits,
            ours,
        )


@pytest.mark.parametrize(
    "model",
    [
        {"scheme": "post_ln", "norm_epsilon": 1e-6},
        {"scheme": "deepnorm", "tie_embeddings": False, "bias": False},
        {"scheme": "deepscalelm_post_ln"},
        {
            "scheme": "deepscalelm_post_ln",
            "norm_epsilon": 1e-2,
            "tie_embeddings": False,
            "activation": "relu2",
        },
        {**MIX, "norm_epsilon": 1e-3},
    ],
)
def test_the_algebra_is_exact_whatever_the_epsilon(model: dict[str, Any]) -> None:
    assert difference(make_config(**model)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 48, 300])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-1])
@pytest.mark.parametrize(
    "model", [{"scheme": "post_ln"}, {"scheme": "deepnorm"}, {"scheme": "deepscalelm_post_ln"}, MIX]
)
def test_the_algebra_is_exact_at_any_depth(model: dict[str, Any], epsilon: float, depth: int) -> None:
    assert difference(make_config(**model, norm_epsilon=epsilon, num_layers=depth)) < 1e-10


def test_the_algebra_would_find_a_wrong_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fold is for: OPT's own epsilon in place of ours."""
    from model.hf.folding import pre_ln

    config = make_config("post_ln", norm_epsilon=1e-3)
    monkeypatch.setitem(pre_ln.FIXED_EPSILON, "opt", 1e-3)  # no factors
    assert fold("opt", config, 1.0).factors == {}
    assert difference(config) > 1e-4


def test_post_ln_with_opts_epsilon_needs_no_factor() -> None:
    assert fold("opt", make_config("post_ln"), 1.0) == Fold({}, 1e-5)
    last = "decoder.layers.4.mlp_output_norm"
    assert fold("opt", make_config("post_ln"), 0.5).factors == {f"{last}.weight": 0.5, f"{last}.bias": 0.5}


def test_factors_of_one_layer_by_hand() -> None:
    """lambda = beta = sqrt(1/2), as float32 has it; a norm after the embedding; tied.

    Epsilon is OPT's, so that c = lambda.
    """
    config = make_config("deepscalelm_post_ln", num_layers=1, scheme_options={"k": 1.0, "alpha": 1.0})
    root, expected = 0.5**0.5, dict[str, float]()
    for module in ("self_attention.linear_proj", "mlp.linear_fc2"):
        expected |= {
            f"decoder.layers.0.{module}.{leaf}": root for leaf in ("weight", "bias")
        }  # (beta / lambda) c
    expected |= {
        f"decoder.layers.0.{module}.weight": 1 / root
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1")
    }
    expected |= {f"decoder.layers.0.pre_mlp_layernorm.{leaf}": root for leaf in ("weight", "bias")}
    expected |= {"embedding.norm.weight": 1.0, "embedding.norm.bias": root}  # sqrt(2) c and c
    expected |= {
        f"embedding.{table}.{leaf}": root
        for table in ("word_embeddings", "position_embeddings")
        for leaf in ("weight", "bias")
    }
    expected |= {f"decoder.layers.0.mlp_output_norm.{leaf}": 0.3 / root for leaf in ("weight", "bias")}
    factors, _ = post_ln_factors("opt", config, 0.3, OPT_EPSILON)
    assert {name: factors.get(name, 1.0) for name in expected} == pytest.approx(expected, rel=1e-6)
    assert set(factors) <= set(expected)


@pytest.mark.parametrize(
    ("sublayer", "change_of_it", "reason"),
    [
        ("attention", {"norm_in": True}, "attention sublayer of layer 2 has a norm before its branch"),
        ("attention", {"norm_out": True}, "mlp sublayer of layer 2 has a norm before its branch"),
        ("attention", {"norm_branch": True}, "norm after its branch"),
        ("attention", {"skip_scale": 1.0}, "a second time"),
        ("mlp", {"skip_scale": 1.0}, "a second time"),
        (
            "mlp",
            {"norm_in": False, "residual_from_norm": False},
            "mlp sublayer of layer 2 gets a residual sum without a norm",
        ),
        ("mlp", {"residual_from_norm": False}, "residual before the norm"),
        ("mlp", {"norm_out": False}, "mlp sublayer of layer 2 has no norm after the residual sum"),
        ("mlp", {"residual_scale": 0.0}, "scales its residual by 0.0"),
        ("attention", {"residual_scale": -1.0}, "scales its residual by -1.0"),
    ],
)
def test_any_single_departure_from_the_form_is_found(
    sublayer: str, change_of_it: dict[str, bool | float], reason: str
) -> None:
    good = Layer(
        Sublayer(residual_scale=0.9, branch_scale=0.3, input_scale=0.7),
        Sublayer(
            norm_in=True,
            residual_from_norm=True,
            norm_out=True,
            residual_scale=0.8,
            branch_scale=0.2,
            input_scale=0.6,
        ),
    )
    bad = replace(good, **{sublayer: replace(getattr(good, sublayer), **change_of_it)})  # type: ignore[arg-type]
    assert post_ln_obstacle(DepthPlan((good, good, good), True, True)) is None
    found = post_ln_obstacle(DepthPlan((good, bad, good), False, False))
    assert found is not None
    assert reason in found


def test_which_schemes_are_post_ln_today() -> None:
    assert {name for name in SCHEMES if post_ln_obstacle(make_config(name).depth_plan()) is None} == {
        "post_ln",
        "deepscalelm_post_ln",
        "deepnorm",
    }


def test_a_scheme_is_known_by_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new scheme with every coefficient set.

    The inner norm is written as the attention's norm_out, and norms stand all around.
    """
    attention, mlp = (
        Sublayer(norm_out=True, residual_scale=0.9, branch_scale=0.3, input_scale=0.7),
        Sublayer(norm_out=True, residual_scale=1.3, input_scale=2),
    )
    new = Scheme("new", "", "", lambda depth: Layer(attention, mlp), embedding_norm=True, final_norm=True)
    monkeypatch.setitem(SCHEMES, "new", new)
    assert difference(make_config("new", norm_epsilon=1e-4)) < 1e-11
