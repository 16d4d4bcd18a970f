"""Encoder-decoders: which stock class computes which model, proved exports, and generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from model.hf.proof import ProofError, change, forget
from model.hf.result import Export
from model.hf.settings.write import SPECIAL, START, STOCK, write_config
from model.hf.trust import own_code
from pretrain.data.tokens.train import special_names, train_tokenizer
from tests.model.hf.crossed import asked, make_crossed, published
from tests.model.hf.tiny import LOGIT_SCALE, POSITIONS, export_tiny, make_weights

CROSSED = [name for name, scheme in SCHEMES.items() if not scheme.no_cross]
PRE = ("pre_ln", "deepscalelm_pre_ln", "layernorm_scaling")
POST = ("post_ln", "deepscalelm_post_ln", "deepnorm")
FIXED: dict[str, Any] = {"position": "sinusoidal"}
NORMED: dict[str, Any] = {"embedding_norm": True}
BIASED: dict[str, Any] = {"logit_bias": True, "norm_epsilon": 1e-6, "bias": False}
ROTARY: dict[str, Any] = {
    "position": "rotary",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "encoder_attention_heads": 4,
    "tie_embeddings": False,
    "share_embeddings": False,
}
IDS = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 1, START: 2}


def written(config: ModelConfig, folder: Path, weights: dict[str, Tensor], **given: Any) -> Export:
    return export_tiny(
        weights,
        config,
        folder / "out",
        special=IDS,
        prove_with=published(config, weights),
        **given,
    )


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "out", trust_remote_code=True).eval()


def stock_in_float64(target: Any, config: ModelConfig, weights: dict[str, Tensor]) -> Any:
    """The export without any rounding of weights or arithmetic."""
    plan = fold(target, config, LOGIT_SCALE)
    settings = write_config(
        target, config, plan, positions=POSITIONS, logit_scale=LOGIT_SCALE, dtype="float64", special=IDS
    )
    kind = type(transformers.AutoConfig.for_model(target))
    model = getattr(transformers, STOCK[target])(kind(**settings)).double().eval()
    state: dict[str, Tensor] = {}
    for entry in entries(target, config, POSITIONS):
        exact = torch.full(entry.shape, 0.0, dtype=torch.float64)
        if isinstance(entry.constant, Tensor):
            exact = entry.constant.double()
        elif entry.constant is None:
            exact = weights[entry.canonical].double()
        exact = exact * plan.factors.get(entry.canonical, 1.0)
        state |= dict(zip(entry.hf, entry.conversion.to_hf(exact, config), strict=True))
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("embed_" in name or name == "lm_head.weight" for name in missing.missing_keys)
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    ("target", "scheme", "given"),
    [
        *[("bart", scheme, {**NORMED, **FIXED}) for scheme in POST],
        *[("bart", scheme, {**NORMED, **BIASED}) for scheme in POST],
        *[("marian", scheme, {**FIXED, "hidden_dropout": 0.3, **BIASED}) for scheme in POST[::2]],
        ("marian", "post_ln", {**FIXED, "share_embeddings": False}),
        *[("blenderbot", scheme, {**FIXED, **BIASED}) for scheme in PRE],
        *[("mbart", scheme, {**NORMED, **BIASED}) for scheme in PRE],
        ("mbart", "pre_ln", {**NORMED, **FIXED}),
    ],
)
def test_the_algebra_of_a_stock_class_is_exact(target: Any, scheme: str, given: dict[str, Any]) -> None:
    # Epsilons that a class cannot hold are told apart from the algebra, which has none left here.
    exact = scheme in ("post_ln", "pre_ln", "layernorm_scaling") or target == "bart"
    config = make_crossed(scheme, **given)
    assert obstacle(target, config) is None
    weights, inputs = make_weights(config), asked(config)
    with torch.no_grad():
        theirs = inputs.seen(stock_in_float64(target, config, weights)(**inputs.arguments()).logits)
    ours = inputs.ask(published(config, weights, dtype=torch.float64))[..., :101]
    # Fixed positions are in fp32 there.
    limit = 1e-6 if config.position == "sinusoidal" else 1e-11
    assert change(theirs, ours) < (limit if exact and target != "marian" else 1e-5)


@pytest.mark.parametrize("scheme", CROSSED)
@pytest.mark.parametrize("given", [FIXED, NORMED, ROTARY], ids=["fixed", "normed", "rotary"])
def test_every_scheme_is_exported_and_proved(scheme: str, given: dict[str, Any], tmp_path: Path) -> None:
    config = make_crossed(scheme, **given)
    result = written(config, tmp_path, make_weights(config))
    expected = "fathom"
    normed = given is NORMED or SCHEMES[scheme].embedding_norm
    if given is not ROTARY and scheme in PRE:
        expected = "mbart" if normed else "blenderbot"
    if given is not ROTARY and scheme in POST:
        expected = "bart" if normed else "marian"
    assert (result.architecture, result.skipped) == (expected, ())
    # All of the source's positions, and of one target the first half.
    assert result.proof.tokens == POSITIONS + POSITIONS // 2
    assert ("modeling_fathom_seq2seq.py" in result.files) is (expected == "fathom")
    assert own_code(tmp_path / "out") is (expected == "fathom")


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("b2t", FIXED),
        ("gpas", ROTARY),
        ("post_ln", NORMED),
        ("post_ln", FIXED),
        ("pre_ln", FIXED),
        ("pre_ln", NORMED),
    ],
)
def test_generation_is_that_of_the_logits_with_and_without_cache(
    scheme: str, given: dict[str, Any], tmp_path: Path
) -> None:
    config = make_crossed(scheme, **given)
    weights = make_weights(config)
    written(config, tmp_path, weights)
    model, inputs = loaded(tmp_path), asked(config)
    assert inputs.source is not None
    assert inputs.source_keep is not None
    read = {"input_ids": inputs.source, "attention_mask": inputs.source_keep}
    settings = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert settings == {"eos_token_id": 2, "pad_token_id": 1, START: 2, "max_length": POSITIONS}
    for beams in (1, 3):
        kept, anew = (
            model.generate(**read, num_beams=beams, use_cache=cache, min_new_tokens=8)
            for cache in (True, False)
        )
        assert torch.equal(kept, anew)
        assert kept[:, 0].eq(2).all()
        if beams == 1:
            ours = published(config, weights)(
                kept[:, :-1], inputs.source, inputs.source_keep, torch.ones_like(kept[:, 1:])
            )[..., :101]
            ours[:, :8, 2] = float("-inf")
            done = kept[:, :-1].eq(2).int().cumsum(1).gt(1)
            assert (ours.argmax(-1).eq(kept[:, 1:]) | done).all()
    forget(model)


def test_our_class_is_saved_again_trained_and_resized(tmp_path: Path) -> None:
    config = make_crossed("b2t", **FIXED, logit_bias=True)
    written(config, tmp_path, make_weights(config))
    model, inputs = loaded(tmp_path), asked(config)
    with torch.no_grad():
        before = model(**inputs.arguments()).logits
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again.eval()(**inputs.arguments()).logits, before)
    assert inputs.keep is not None
    labels = inputs.tokens.masked_fill(inputs.keep.eq(0), -100)
    again.gradient_checkpointing_enable()
    again.train()
    found = again(input_ids=inputs.source, attention_mask=inputs.source_keep, labels=labels)
    found.loss.backward()
    assert all(one.grad is not None for one in again.parameters())
    started = again.prepare_decoder_input_ids_from_labels(labels)
    assert (started[:, 0] == 2).all()
    assert (started != -100).all()
    again.resize_token_embeddings(110)
    grown = again.eval()(**inputs.arguments()).logits
    assert grown.shape[-1] == 110
    assert torch.allclose(grown[..., :101], before, atol=1e-5)
    forget(model)
    forget(again)


def test_padding_on_the_left_of_a_source_changes_nothing_in_our_class(tmp_path: Path) -> None:
    config = make_crossed("b2t", **FIXED)
    written(config, tmp_path, make_weights(config))
    model = loaded(tmp_path)
    source, tokens = torch.arange(3, 10)[None], torch.arange(20, 25)[None]
    pad = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        plain = model(input_ids=source, decoder_input_ids=tokens).logits
        left = model(
            input_ids=torch.cat((pad, source), 1),
            attention_mask=torch.cat((0 * pad, torch.ones_like(source)), 1),
            decoder_input_ids=tokens,
        ).logits
    assert torch.allclose(plain, left, atol=1e-5)
    forget(model)


@pytest.mark.parametrize(
    ("target", "scheme", "given", "reason"),
    [
        ("gpt2", "pre_ln", {}, "it is a decoder-only language model, the model a model of an encoder"),
        ("bart", "pre_ln", NORMED, "in the encoder, the scheme's attention sublayer of layer 1 has a norm"),
        (
            "bart",
            "b2t",
            NORMED,
            "in the encoder, the scheme's mlp sublayer of layer 1 adds the layer's input",
        ),
        ("bart", "post_ln", {}, "norms after the embeddings: train with model.embedding_norm=true"),
        (
            "bart",
            "post_ln",
            {**NORMED, "position": "none"},
            "it has a table of positions, the model none",
        ),
        ("bart", "post_ln", {**NORMED, "max_source_positions": 20}, "one length, the model's 20 and 24"),
        ("bart", "post_ln", {**NORMED, "activation": "swiglu"}, "its feed-forward has no swiglu"),
        ("bart", "post_ln", {**NORMED, "head_dim": 12}, "its heads span hidden_size"),
        ("bart", "post_ln", {**NORMED, "normalization": "rmsnorm"}, "it has LayerNorm, the model RMSNorm"),
        ("bart", "post_ln", {**NORMED, "tie_embeddings": False}, "its output projection is the table"),
        ("bart", "post_ln", {**NORMED, "share_embeddings": False}, "read one table of words"),
        ("bart", "post_ln", {**NORMED, "logit_soft_cap": 3.0}, "it has no soft caps"),
        ("marian", "post_ln", {}, "its positions are fixed sines and cosines, the model's learned"),
        ("marian", "post_ln", {**FIXED, **NORMED}, "it has no norms after the embeddings, the model has"),
        ("blenderbot", "pre_ln", NORMED, "in the encoder, the scheme has a norm after the embedding"),
        ("blenderbot", "gpas", FIXED, "in the encoder, the scheme's stream is scaled by learned gates"),
        ("mbart", "pre_ln", {}, "norms after the embeddings: train with model.embedding_norm=true"),
    ],
)
def test_what_a_stock_class_cannot_compute_is_refused_with_the_reason(
    target: str, scheme: str, given: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = make_crossed(scheme, **given)
    with pytest.raises(UserError, match=reason):
        written(config, tmp_path, make_weights(config), architecture=target)
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_sees_padding_of_its_source_fails_the_proof(tmp_path: Path) -> None:
    config = make_crossed("b2t")
    weights = make_weights(config)
    plain = published(config, weights)
    with pytest.raises(ProofError, match="does not compute this model"):
        export_tiny(
            weights,
            config,
            tmp_path / "out",
            special=IDS,
            prove_with=lambda tokens, source, source_keep, keep: plain(
                tokens, source, torch.ones_like(source_keep), keep
            ),
        )
    assert not (tmp_path / "out").exists()


USE = """
import sys
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model = AutoModelForSeq2SeqLM.from_pretrained(".", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
texts = ["the deep layers", "a scale"]
batch = tokenizer(texts, padding=True, return_tensors="pt")
assert batch.input_ids[0, -1] == tokenizer.eos_token_id and batch.attention_mask[1, -1] == 0
assert tokenizer("", text_target="x").labels[-1] == tokenizer.eos_token_id
together = model.generate(**batch, num_beams=2, max_new_tokens=5, min_new_tokens=5)
for text, best in zip(texts, together):
    given = tokenizer(text, return_tensors="pt")
    alone = model.generate(**given, num_beams=2, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(alone[0], best) and best[0] == tokenizer.eos_token_id
assert not {"model", "pretrain", "megatron"} & set(sys.modules)
print(tokenizer.batch_decode(together, skip_special_tokens=True))
"""


@pytest.mark.parametrize(
    ("scheme", "given"), [("b2t", FIXED), ("pre_ln", FIXED), ("post_ln", FIXED), ("post_ln", NORMED)]
)
def test_a_fresh_process_translates_with_transformers_alone(
    scheme: str, given: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("the deep layers norm the signal, a scale of time\n" * 50)
    tokenizer = tmp_path / "joint.model"
    train_tokenizer([str(tmp_path / "text.txt")], tokenizer, vocab_size=300, special=special_names("pad"))
    config = make_crossed(scheme, vocab_size=300, **given)
    weights = make_weights(config)
    result = export_tiny(
        weights, config, tmp_path / "out", tokenizer=tokenizer, prove_with=published(config, weights)
    )
    assert result.tokenizer is not None
    special = result.tokenizer.special
    assert special[START] == special["eos_token_id"] != special["pad_token_id"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE],
        cwd=tmp_path / "out",
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_a_stock_class_is_told_where_a_text_starts(tmp_path: Path) -> None:
    config = make_crossed("pre_ln", **FIXED)
    with pytest.raises(UserError, match="decoder_start_token_id is not known, and without it Blenderbot"):
        export_tiny(make_weights(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_generation_would_do_by_default_is_taken_out_of_stock_settings(tmp_path: Path) -> None:
    config = make_crossed("pre_ln", **FIXED)
    written(config, tmp_path, make_weights(config), dtype="bfloat16")
    settings = json.loads((tmp_path / "out/config.json").read_text())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        assert settings[name] is None
    assert settings["encoder_no_repeat_ngram_size"] == 0
    assert settings["scale_embedding"] is False
    assert [settings[name] for name in (*SPECIAL, START)] == [None, 2, 1, 2]
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag: translation" in card
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card
