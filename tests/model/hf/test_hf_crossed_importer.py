"""Encoder-decoders of transformers, and exports of our own class, read as checkpoints' weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from model.errors import UserError
from model.hf.crossed_reference import CrossedEvaluation
from model.hf.export import export
from model.hf.importer import import_model
from model.hf.proof import change
from model.weights.init import logit_scale
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.folders.import_hf import import_checkpoint
from pretrain.trained.open import open_trained
from pretrain.trained.scorer import Scorer
from tests.model.hf.crossed import asked, make_crossed, published
from tests.model.hf.tiny import POSITIONS, make_weights

SIZES = {
    "d_model": 16,
    "vocab_size": 101,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
CLASSES = {
    "bart": transformers.BartForConditionalGeneration,
    "mbart": transformers.MBartForConditionalGeneration,
    "blenderbot": transformers.BlenderbotForConditionalGeneration,
    "marian": transformers.MarianMTModel,
}


def saved(kind: str, folder: Path, **given: Any) -> Any:
    """A random model of transformers, in a folder."""
    generator = torch.Generator().manual_seed(0)
    model = CLASSES[kind](CLASSES[kind].config_class(**{**SIZES, **given})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not (kind == "marian" and "embed_positions" in name):
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                weight.copy_(around + 0.3 * torch.randn(weight.shape, generator=generator))
        model.final_logits_bias.copy_(torch.randn(1, 101, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        *[(kind, {"scale_embedding": scaled}) for kind in CLASSES for scaled in (False, True)],
        ("marian", {"share_encoder_decoder_embeddings": False, "activation_function": "swish"}),
    ],
)
def test_logits_are_those_of_transformers(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = saved(kind, tmp_path, **given)
    imported = import_model(tmp_path, vocab_multiple=16)
    assert imported.layout == kind
    assert imported.logit_scale == pytest.approx(logit_scale(imported.config), rel=1e-12)
    inputs = asked(imported.config)
    with torch.no_grad():
        theirs = inputs.seen(model.double()(**inputs.arguments()).logits)
    ours = CrossedEvaluation(
        imported.weights, imported.config, logit_scale=imported.logit_scale, dtype=torch.float64
    )
    # Marian's sines and cosines are in fp32.
    assert change(inputs.ask(ours), theirs) < (1e-6 if kind == "marian" else 1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_import_is_a_checkpoint_that_becomes_the_same_class_again(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "theirs", scale_embedding=True)
    import_checkpoint(str(tmp_path / "theirs"), tmp_path / "run", vocab_multiple=16)
    trained = open_trained(tmp_path / "run")
    assert (trained.positions, trained.source_positions) == (POSITIONS, POSITIONS)
    result = export_checkpoint(tmp_path / "run", tmp_path / "ours")
    assert result.architecture == kind
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    inputs = asked(trained.config)
    with torch.no_grad():
        ours, theirs = (inputs.seen(one(**inputs.arguments()).logits) for one in (again, model))
    assert change(ours, theirs) < 1e-5
    # As an export asks a run of that precision.
    rounded = inputs.ask(Scorer(trained, "bf16", verified=True).logits)[:, :101]
    assert torch.cosine_similarity(rounded.flatten(), theirs.flatten(), dim=0) > 0.99
    assert again.generation_config.decoder_start_token_id == 2


def test_files_without_some_names_and_with_others_are_read_alike(tmp_path: Path) -> None:
    """As older versions wrote them: of the base model, tied tables twice, fixed positions too."""
    saved("marian", tmp_path)
    whole = import_model(tmp_path, vocab_multiple=16)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {name: whole.weights[name] for name in whole.weights}
    tensors["model.encoder.embed_tokens.weight"] = tensors["model.shared.weight"].clone()
    model = transformers.MarianMTModel.from_pretrained(tmp_path)
    fixed = "model.encoder.embed_positions.weight"
    tensors[fixed] = model.state_dict()[fixed].clone()
    del tensors["final_logits_bias"]
    files = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(files, tmp_path / "model.safetensors")
    found = import_model(tmp_path, vocab_multiple=16).weights
    assert not found["output_layer.bias"].any()
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != "output_layer.bias")
    files[fixed.removeprefix("model.")] = tensors[fixed] + 0.1
    save_file(files, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has learned positions, up to 0.1 away from the sines"):
        import_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "given", "reason"),
    [
        ("bart", {"is_decoder": True}, "it is a decoder by itself"),
        ("bart", {"tie_word_embeddings": False}, "its output projection is a matrix of its own"),
        ("bart", {"activation_function": "tanh"}, "its activation is tanh; supported: gelu, gelu_new"),
        ("marian", {"decoder_vocab_size": 90}, r"another vocabulary \(decoder_vocab_size=90\)"),
        ("mbart", {"activation_dropout": 0.1}, "set activation_dropout to 0 in config.json"),
        ("mbart", {"encoder_layerdrop": 0.1}, r"\(encoder_layerdrop, decoder_layerdrop\)"),
        ("bart", {"model_type": "t5"}, "a learned bias by relative position to the scores"),
        ("bart", {"d_model": 18}, "num_attention_heads"),
        ("blenderbot", {"decoder_layers": 4}, "no tensor 'model.decoder.layers.3"),
    ],
)
def test_what_is_not_ours_is_refused_with_the_reason(
    kind: str, given: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
    with pytest.raises(UserError, match=reason):
        import_model(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("b2t", {"position": "sinusoidal", "share_embeddings": False}),
        ("gpas", {"position": "rotary", "encoder_attention_heads": 4, "tie_embeddings": False}),
        ("deepscalelm_post_ln", {"max_source_positions": 20, "logit_bias": True}),
    ],
)
def test_exports_of_our_class_come_back_bit_by_bit(
    scheme: str, given: dict[str, Any], tmp_path: Path
) -> None:
    config = make_crossed(scheme, **given)
    weights = make_weights(config)
    export(
        weights,
        config,
        tmp_path / "hf",
        logit_scale=logit_scale(config),
        tokenizer=None,
        seq_length=POSITIONS,
        architecture="fathom",
        prove_with=published(config, weights, logit_scale(config)),
    )
    imported = import_model(tmp_path / "hf")
    assert imported.config == config
    assert set(imported.weights) == set(weights)
    for name, weight in weights.items():
        rows = config.vocab_size if weight.shape[0] == config.padded_vocab else len(weight)
        assert torch.equal(imported.weights[name][:rows], weight[:rows])


@pytest.mark.parametrize(
    ("key", "value"), [("encoder_layers", 2), ("sinusoid_scale", 2.0), ("share_embeddings", False)]
)
def test_a_configuration_that_contradicts_itself_is_refused(key: str, value: object, tmp_path: Path) -> None:
    config = make_crossed("b2t", position="sinusoidal")
    export(
        make_weights(config),
        config,
        tmp_path / "hf",
        logit_scale=logit_scale(config),
        tokenizer=None,
        seq_length=POSITIONS,
    )
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=f"config.json has {key}={value}, but its `pretraining` section"):
        import_model(tmp_path / "hf")
