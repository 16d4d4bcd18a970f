"""A scheme chosen over a configuration, with options."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import UserError
from pretrain.config.scheme_choice import parse_variant, parse_variants


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


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("nope", "is unknown"),
        ("b2t:foo=1", "scheme_options.foo"),
        ("b2t:rescale", "KEY=VALUE"),
        ("b2t:rescale=1", "true/false"),
        ("pre_ln,pre_ln", "twice"),
        (" , ", "no scheme"),
    ],
)
def test_wrong_variants_are_refused(wrong: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse_variants(wrong)
    with pytest.raises(UserError, match="init.base"):
        parse_variant("b2t:init.base=zzz").apply(model())
