"""Encoders: the plain evaluation, which stock class computes which model, and proved exports."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.hf.folding.obstacles import obstacle
from model.hf.folding.pre_ln import fold
from model.hf.mapping import entries
from model.hf.proof import Inputs, ProofError, change, forget, proof_inputs
from model.hf.reference import Evaluation
from model.hf.settings.write import SPECIAL, write_config
from tests.model.hf.tiny import LOGIT_SCALE, POSITIONS, export_tiny, make_encoder, make_weights, reference

VARIANTS: list[dict[str, Any]] = [
    {"num_query_groups": 2, "normalization": "rmsnorm", "position": "rotary", "activation": "swiglu"},
    {"head_dim": 12, "activation": "geglu", "norm_epsilon": 1e-3, "bias": False, "token_types": 0},
    {"embedding_norm": True, "activation": "relu2", "tie_embeddings": False},
    {"plain_head": True, "logit_bias": True, "token_types": 0, "window": 2},
]
STOCK = {
    "pre_ln": "megatron-bert",
    "layernorm_scaling": "megatron-bert",
    "deepscalelm_pre_ln": "megatron-bert",
    "deepscalelm_post_ln": "bert",
}
"""Of models with default settings; all others have no stock class."""
EUROBERT: dict[str, Any] = {
    "token_types": 0,
    "normalization": "rmsnorm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "plain_head": True,
    "num_query_groups": 2,
}
"""What a model of EuroBERT's kind has."""
MODERNBERT: dict[str, Any] = {
    "token_types": 0,
    "position": "rotary",
    "activation": "geglu",
    "bias": False,
    "embedding_norm": True,
    "first_norm": False,
    "window": 3,
    "global_every": 3,
    "rotary_base": 160000,
    "rotary_base_local": 10000,
}
"""What a model of ModernBERT's kind has."""
NO_IDS = dict.fromkeys(SPECIAL)


def inputs_of(config: ModelConfig) -> Inputs:
    return proof_inputs(config, 16)


@pytest.mark.parametrize(("scheme", "variant"), list(itertools.product(SCHEMES, range(len(VARIANTS)))))
def test_equals_the_reference(scheme: str, variant: int) -> None:
    config = make_encoder(scheme, **VARIANTS[variant])
    weights, inputs = make_weights(config), inputs_of(config)
    ours = inputs.ask(Evaluation(weights, config, logit_scale=LOGIT_SCALE, dtype=torch.float64))
    expected = inputs.ask(reference(config, weights, dtype=torch.float64))
    assert ours.shape == (16 + 8, 101)
    torch.testing.assert_close(ours, expected[..., :101], rtol=0, atol=1e-9)


def stock_in_float64(
    target: Any, config: ModelConfig, weights: dict[str, Tensor], logit_scale: float = LOGIT_SCALE
) -> Any:
    """The export without any rounding of weights or arithmetic."""
    plan = fold(target, config, logit_scale)
    settings = write_config(
        target, config, plan, positions=POSITIONS, logit_scale=logit_scale, dtype="float64", special=NO_IDS
    )
    (name,) = cast(list[str], settings["architectures"])
    kind = getattr(transformers, name.replace("ForMaskedLM", "Config"))
    model = getattr(transformers, name)(kind(**settings)).double().eval()
    state: dict[str, Tensor] = {}
    for entry in entries(target, config, POSITIONS):
        if entry.constant is None:
            exact = weights[entry.canonical].double() * plan.factors.get(entry.canonical, 1.0)
        else:
            exact = torch.zeros(entry.shape, dtype=torch.float64) + entry.constant
        state |= dict(zip(entry.hf, entry.conversion.to_hf(exact, config), strict=True))
    for name, source in (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("lm_head.weight", "model.embed_tokens.weight"),
        ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    ):
        if name in model.state_dict():
            state.setdefault(name, state[source])
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("target", "scheme", "given"),
    [
        ("bert", "post_ln", {"embedding_norm": True, "norm_epsilon": 1e-6}),
        ("bert", "deepnorm", {"embedding_norm": True, "token_types": 0, "bias": False}),
        ("bert", "deepscalelm_post_ln", {"norm_epsilon": 1e-2, "activation": "relu2"}),
        ("megatron-bert", "pre_ln", {"norm_epsilon": 1e-3}),
        ("megatron-bert", "layernorm_scaling", {"token_types": 0}),
        # One epsilon for all norms is exact where none is.
        ("megatron-bert", "deepscalelm_pre_ln", {"norm_epsilon": 1e-16}),
        ("modernbert", "pre_ln", MODERNBERT),
        ("modernbert", "layernorm_scaling", {**MODERNBERT, "bias": True, "tie_embeddings": False}),
        (
            "modernbert",
            "deepscalelm_pre_ln",
            {**MODERNBERT, "norm_epsilon": 1e-16, "window": None, "global_every": None}
            | {"rotary_base_local": None, "activation": "swiglu"},
        ),
        ("eurobert", "pre_ln", {**EUROBERT, "rotary_base": 250000}),
        ("eurobert", "layernorm_scaling", {**EUROBERT, "bias": True, "logit_bias": True}),
        ("eurobert", "deepscalelm_pre_ln", {**EUROBERT, "norm_epsilon": 1e-16, "tie_embeddings": False}),
    ],
)
def test_the_algebra_of_a_stock_class_is_exact(target: Any, scheme: str, given: dict[str, Any]) -> None:
    config = make_encoder(scheme, **given)
    assert obstacle(target, config) is None
    weights, inputs = make_weights(config), inputs_of(config)
    with torch.no_grad():
        theirs = inputs.seen(stock_in_float64(target, config, weights)(**inputs.arguments()).logits)
    ours = inputs.ask(reference(config, weights, dtype=torch.float64))[..., :101]
    # Rotary angles, and EuroBERT's norms, are in fp32 there whatever the weights are in.
    assert change(theirs, ours) < (1e-5 if config.position == "rotary" else 1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_exported_and_proved(scheme: str, tmp_path: Path) -> None:
    config = make_encoder(scheme)
    weights = make_weights(config)
    result = export_tiny(weights, config, tmp_path / "out", prove_with=reference(config, weights))
    expected = STOCK.get(scheme, "fathom")
    assert result.architecture == expected
    assert result.proof.tokens == POSITIONS + POSITIONS // 2
    assert "generation_config.json" not in result.files
    assert (
        "modeling_fathom_encoder.py" in result.files
        and "modeling_fathom.py" in result.files
        and "configuration_fathom.py" in result.files
    ) is (expected == "fathom")
    inputs = inputs_of(config)
    model = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "out", trust_remote_code=expected == "fathom"
    ).eval()
    with torch.no_grad():
        theirs = inputs.seen(model(**inputs.arguments()).logits)
    forget(model)
    ours = inputs.ask(reference(config, weights))[..., :101]
    assert change(theirs, ours) < 1e-4


@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_pre_ln", "b2t"])
def test_a_model_of_eurobert_s_kind_is_proved_with_padding(scheme: str, tmp_path: Path) -> None:
    # At 1e-5 the one epsilon of all norms would move DeepScaleLM's logits too far.
    config = make_encoder(scheme, **EUROBERT, norm_epsilon=1e-6)
    weights = make_weights(config)
    result = export_tiny(weights, config, tmp_path / "out", prove_with=reference(config, weights))
    assert result.architecture == ("fathom" if scheme == "b2t" else "eurobert")
    assert result.proof.tokens == POSITIONS + POSITIONS // 2
    if scheme != "b2t":
        kind = transformers.AutoModelForSequenceClassification
        assert type(kind.from_pretrained(tmp_path / "out")).__name__ == "EuroBertForSequenceClassification"
        return
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", num_labels=3, trust_remote_code=True
    )
    assert model(**inputs_of(config).arguments()).logits.shape == (2, 3)
    forget(model)


@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_pre_ln", "peri_ln"])
def test_a_model_of_modernbert_s_kind_is_proved_with_padding(scheme: str, tmp_path: Path) -> None:
    config = make_encoder(scheme, **MODERNBERT, norm_epsilon=1e-6)
    weights = make_weights(config)
    result = export_tiny(weights, config, tmp_path / "out", prove_with=reference(config, weights))
    assert result.architecture == ("fathom" if scheme == "peri_ln" else "modernbert")
    assert result.proof.tokens == POSITIONS + POSITIONS // 2
    assert "each token sees 3 on each side, all in one layer of 3" in (tmp_path / "out/README.md").read_text()


def test_a_model_of_bits_is_stored_and_described(tmp_path: Path) -> None:
    config = make_encoder("deepscalelm_post_ln")
    result = export_tiny(make_weights(config), config, tmp_path / "out", logit_scale=1.0, dtype="bfloat16")
    assert 0 < result.dtype_difference < 0.2
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert (settings["architectures"], settings["use_cache"]) == (["BertForMaskedLM"], False)
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert "AutoModelForMaskedLM.from_pretrained" in card
    assert "Lower the rate, or export with `--architecture fathom`" in card


@pytest.mark.parametrize(
    ("target", "scheme", "given", "reason"),
    [
        ("gpt2", "pre_ln", {}, "it is a decoder-only language model, the model a bidirectional encoder"),
        ("bert", "post_ln", {}, "a norm after the embedding: train with model.embedding_norm=true"),
        ("bert", "pre_ln", {}, "norm before its branch"),
        ("megatron-bert", "pre_ln", {"embedding_norm": True}, "a norm after the embedding"),
        ("megatron-bert", "pre_ln", {"position": "rotary"}, "it has learned positions, the model rotary"),
        ("megatron-bert", "pre_ln", {"activation": "geglu"}, "its feed-forward has no geglu"),
        ("megatron-bert", "pre_ln", {"tie_embeddings": False}, "its output projection is the table of words"),
        ("megatron-bert", "pre_ln", {"plain_head": True}, "a dense layer, an activation and a norm before"),
        ("eurobert", "pre_ln", {**EUROBERT, "plain_head": False}, "train with model.plain_head=true"),
        ("eurobert", "pre_ln", {**EUROBERT, "logit_bias": True}, "model.logit_bias=True, model.bias=False"),
        ("eurobert", "pre_ln", {**EUROBERT, "token_types": 2}, "it has no table of token types"),
        ("eurobert", "pre_ln", {**EUROBERT, "activation": "gelu"}, "the model's activation is gelu"),
        ("eurobert", "b2t", EUROBERT, "norm"),
        ("modernbert", "pre_ln", {**MODERNBERT, "first_norm": True}, "and model.first_norm=false"),
        ("modernbert", "peri_ln", MODERNBERT, "has a norm after its branch"),
        ("modernbert", "pre_ln", {**MODERNBERT, "normalization": "rmsnorm"}, "has LayerNorm, the model RMS"),
        ("modernbert", "pre_ln", {**MODERNBERT, "plain_head": True}, "a dense layer, an activation"),
        (
            "modernbert",
            "pre_ln",
            {**MODERNBERT, "global_every": None, "rotary_base_local": None},
            "its first layer sees the whole sequence",
        ),
        ("eurobert", "pre_ln", {**EUROBERT, "window": 4}, "its tokens see the whole sequence"),
    ],
)
def test_what_a_stock_class_cannot_compute_is_refused_with_the_reason(
    target: str, scheme: str, given: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = make_encoder(scheme, **given)
    with pytest.raises(UserError, match=reason):
        export_tiny(make_weights(config), config, tmp_path / "out", logit_scale=1.0, architecture=target)


def test_a_decoder_is_no_bert(tmp_path: Path) -> None:
    from tests.model.hf.tiny import make_config

    assert "it is a bidirectional encoder" in (obstacle("bert", make_config("post_ln")) or "")


def test_a_reference_that_ignores_padding_fails_the_proof(tmp_path: Path) -> None:
    config = make_encoder("b2t")
    weights = make_weights(config)
    plain = reference(config, weights)
    with pytest.raises(ProofError, match="does not compute this model"):
        export_tiny(
            weights,
            config,
            tmp_path / "out",
            prove_with=lambda tokens, keep, types: plain(tokens, None, types),
        )
    assert not (tmp_path / "out").exists()
