"""What the importer refuses: other models, files that do not fit, sources that are no models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from model.errors import UserError
from model.hf.export import export
from model.hf.importer import import_model
from tests.model.hf.foreign import BERT, GPT2, LLAMA, MODERNBERT, OPT, save
from tests.model.hf.tiny import POSITIONS, make_config, make_weights


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"model_type": "roberta"},
            "model_type='roberta' cannot be imported; supported: gpt2, llama, mistral, qwen2, qwen3, "
            "gpt_neox, gemma, gemma2, gemma3_text, opt, bert, megatron-bert, eurobert, modernbert, bart, "
            "mbart, blenderbot, marian, vit, fathom",
        ),
        (
            {**GPT2, "model_type": "gpt2", "activation_function": "tanh"},
            "activation is tanh; supported: gelu, gelu_new, relu",
        ),
        (
            {**GPT2, "model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scaled by the layer number",
        ),
        ({**GPT2, "model_type": "gpt2", "scale_attn_weights": False}, "not scaled"),
        ({**GPT2, "model_type": "gpt2", "add_cross_attention": True}, "cross-attention"),
        ({**GPT2, "model_type": "gpt2", "embd_pdrop": 0.0}, "resid_pdrop=0.1 and embd_pdrop=0.0 differ"),
        (
            {**LLAMA, "model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope_type=dynamic\): its frequencies change with the length",
        ),
        (
            {**LLAMA, "model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}},
            r"has no factor \(llama3\)",
        ),
        (
            {**LLAMA, "model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}},
            "part of each head",
        ),
        ({**LLAMA, "model_type": "llama", "rope_theta": 10000.5}, "not a whole number"),
        ({**LLAMA, "model_type": "llama", "attention_bias": True}, "attention_bias=True and mlp_bias=False"),
        ({**LLAMA, "model_type": "llama", "hidden_act": "relu"}, "activation is relu"),
        ({**LLAMA, "model_type": "llama", "sliding_window": 9}, r"sliding-window attention \(9 tokens\)"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 1}, "see themselves only"),
        ({**LLAMA, "model_type": "qwen3", "attention_bias": True}, "its attention has biases"),
        (
            {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            "its layers that see all tokens do not follow each other evenly",
        ),
        ({**LLAMA, "model_type": "gemma2", "head_dim": 8}, "query_pre_attn_scalar=256, not of head_dim=8"),
        ({**LLAMA, "model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "scores have a soft cap"),
        ({**LLAMA, "model_type": "olmo2"}, "queries and keys of all heads together"),
        ({**LLAMA, "model_type": "gpt_oss"}, "mixtures of experts"),
        ({**LLAMA, "model_type": "gpt_neox"}, "use_parallel_residual=true, as in Pythia"),
        ({**MODERNBERT, "model_type": "modernbert", "mlp_bias": True}, "mlp_bias=True and"),
        ({**MODERNBERT, "model_type": "modernbert", "decoder_bias": False}, "decoder_bias=false"),
        ({**MODERNBERT, "model_type": "modernbert", "classifier_activation": "silu"}, "activation is silu"),
        ({**MODERNBERT, "model_type": "modernbert", "mlp_dropout": 0.1}, "mlp_dropout=0.1"),
        ({**MODERNBERT, "model_type": "modernbert", "layer_types": ["full_attention"] * 3}, "evenly"),
        ({**OPT, "model_type": "opt", "do_layer_norm_before": True}, "only post-LN ones are read"),
        ({**OPT, "model_type": "opt", "word_embed_proj_dim": 16}, "embeddings are 16 wide and projected"),
        ({**OPT, "model_type": "opt", "layer_norm_elementwise_affine": False}, "no gain and bias"),
        ({**OPT, "model_type": "opt", "layerdrop": 0.1}, r"layers out in training \(layerdrop=0.1\)"),
        ({**BERT, "model_type": "bert", "is_decoder": True}, "it is a decoder"),
        ({**BERT, "model_type": "bert", "type_vocab_size": 3}, "it has 3 token types"),
        ({**BERT, "model_type": "bert", "tie_word_embeddings": False}, "a matrix of its own"),
        (
            {**BERT, "model_type": "megatron-bert", "position_embedding_type": "relative_key"},
            "its positions are relative_key",
        ),
        ({**LLAMA, "model_type": "eurobert", "hidden_act": "tanh"}, "activation is tanh"),
        ({"model_type": "fathom"}, "no `pretraining` section"),
    ],
)
def test_what_is_not_ours_is_refused_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=reason):
        import_model(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "no tensor 'model.layers.1.mlp.up_proj.weight'",
        ),
        (
            lambda t: t.__setitem__("model.layers.1.self_attn.q_norm.weight", torch.ones(8)),
            "'model.layers.1.self_attn.q_norm.weight', which config.json does not account for",
        ),
        (
            lambda t: t.__setitem__("model.norm.weight", torch.ones(31)),
            r"model.norm.weight has shape \(31,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, damage: Any, reason: str) -> None:
    save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=reason):
        dict(import_model(tmp_path).weights)


def test_a_changed_plan_is_not_read_as_the_scheme(tmp_path: Path) -> None:
    config = make_config("b2t")
    export(
        make_weights(config), config, tmp_path / "out", logit_scale=1.0, tokenizer=None, seq_length=POSITIONS
    )
    data = json.loads((tmp_path / "out/config.json").read_text())
    data["depth_plan"][0]["mlp"]["skip_scale"] = 0.5
    (tmp_path / "out/config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"has depth_plan=.*0\.5.* but its `pretraining` section gives"):
        import_model(tmp_path / "out")


def test_sources_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no config.json"):
        import_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="has no model.safetensors"):
        import_model(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a model"):
        import_model("no/such/model/anywhere")
