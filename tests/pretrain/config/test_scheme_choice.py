"""A scheme chosen over a configuration, with options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import UserError
from pretrain.config.scheme_choice import parse_variant, parse_variants
from pretrain.config.sections.factors import FactorsConfig


def model(scheme: str = "pre_ln", **more: Any) -> ModelConfig:
    sizes = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 29,
        "max_position_embeddings": 12,
    }
    return ModelConfig(scheme=scheme, **(sizes | more))


def test_variants_are_read_and_applied() -> None:
    variant = parse_variant("b2t:rescale=false:init.base=xavier:activation=relu")
    assert (variant.options, variant.slug) == (
        {"rescale": False},
        "b2t-rescale-false-init.base-xavier-activation-relu",
    )
    applied = variant.apply(model())
    assert (applied.scheme, applied.scheme_options, applied.init.base, applied.activation) == (
        "b2t",
        {"rescale": False},
        "xavier",
        "relu",
    )
    assert parse_variant("deepscalelm_pre_ln:k=4").options == {"k": 4.0}
    assert [one.text for one in parse_variants("pre_ln, b2t")] == ["pre_ln", "b2t"]


def test_what_another_scheme_does_not_read_is_left_out_unless_it_was_asked_for() -> None:
    given = model("deepscalelm_pre_ln", init={"token_correlation": 0.3, "causal_correction": False})
    assert parse_variant("deepscalelm_post_ln").apply(given).init == given.init
    assert (
        parse_variant("pre_ln").apply(given).init
        == ModelConfig(num_layers=1, hidden_size=4, num_attention_heads=1).init
    )
    with pytest.raises(UserError, match="causal_correction=false has no effect with model.scheme=pre_ln"):
        parse_variant("pre_ln:init.causal_correction=false").apply(given)


def test_factors_belong_to_the_scheme() -> None:
    given = FactorsConfig.model_validate({"embedding": {"rate": 3.0}})
    variant = parse_variant("post_ln:branch=1:factors.stream_norm.rate=1/layers:factors.bias.eps=2")
    factors = variant.apply_factors(model("pre_ln"), given)
    assert (factors.embedding.rate, factors.stream_norm.rate, factors.bias.eps) == (1.0, "1/layers", 2.0)
    assert parse_variant("pre_ln").apply_factors(model("pre_ln"), given) == given


RECIPE = """
model:
  scheme: b2t
  scheme_options: {branch: 2.0}
  init: {base: xavier}
optimizer:
  lr: 2e-3
  factors:
    embedding: {rate: sqrt(hidden)}
schedule: {warmup_steps: 60}
"""


def test_a_recipe_is_a_variant(tmp_path: Path) -> None:
    path = tmp_path / "recipe" / "level.yaml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    variant = parse_variant(str(path))
    assert (variant.text, variant.slug, variant.scheme) == ("recipe/level", "recipe-level", "b2t")
    assert (variant.options, variant.settings) == ({"branch": 2.0}, {"init.base": "xavier"})
    assert variant.factors == {"embedding.rate": "sqrt(hidden)"}
    path.write_text(RECIPE + "train: {steps: 5}\n")
    with pytest.raises(UserError, match=r"^--scheme .*level\.yaml: train\.steps is no part of a recipe"):
        parse_variant(str(path), "--scheme")
    path.write_text("optimizer: {lr: 1.0}\n")
    with pytest.raises(UserError, match="choose one of pre_ln"):
        parse_variant(str(path))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("nope", "--schemes nope is unknown: choose one of pre_ln"),
        ("b2t:foo=1", "--schemes b2t:foo=1: .*scheme_options.foo"),
        ("b2t:rescale", "--schemes b2t:rescale: 'rescale' is not of the form KEY=VALUE"),
        ("b2t:rescale=1", "--schemes b2t:rescale=1: .*true/false"),
        ("b2t:init.base=[", r"--schemes b2t:init.base=\[: '\[' is not a value"),
        ("nope.yaml", "--schemes nope.yaml: configuration nope.yaml does not exist; there are recipe/b2t, "),
        ("pre_ln,pre_ln", "--schemes names pre_ln twice"),
        (" , ", "--schemes names no scheme"),
    ],
)
def test_wrong_variants_are_refused_with_their_option(wrong: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        parse_variants(wrong, "--schemes")


@pytest.mark.parametrize("wrong", ["b2t:init.base=zzz", "b2t:factors.bias.speed=2"])
def test_a_variant_that_does_not_fit_is_refused_with_its_option(wrong: str) -> None:
    variant = parse_variant(wrong, "--scheme")
    with pytest.raises(UserError, match=f"^--scheme {wrong}: (init.base|factors.bias.speed)"):
        variant.apply_factors(variant.apply(model()), FactorsConfig())
