"""One table a target: canonical module names -> Hugging Face's, and how tensors are converted."""

from __future__ import annotations

from collections.abc import Mapping

from model.hf.names import crossed
from model.hf.names.conversions import (
    BATCHED,
    CONV1D,
    FINAL_BIAS,
    FRAMES,
    GAIN,
    GATE_UP,
    KV,
    LAST_FRAMES,
    PATCHES,
    PLAIN,
    POSITIONS_FROM_2,
    QKV,
    QKV_CONV1D,
    QKV_FUSED,
    QKV_ROWS,
    QUERY,
    QUERY_GAIN,
    VOCABULARY,
    Conversion,
    Target,
)
from model.hf.names.crossed import NamedRule

LOGIT_BIAS_HF: dict[Target, str] = {
    "bert": "cls.predictions.bias",
    "megatron-bert": "cls.predictions.bias",
    "eurobert": "lm_head.bias",
    "modernbert": "decoder.bias",
    **dict.fromkeys(FINAL_BIAS, "final_logits_bias"),
    "vit": "classifier.bias",
    "fathom": "logit_bias",
}
"""What the bias on the logits is called by the targets that have one."""

# Module name -> (Hugging Face module names, conversion). {i} is the 0-based layer.
# Rules that a model has no tensor for are not used.
Rule = tuple[tuple[str, ...], Conversion]
_L, _E = "decoder.layers.{i}.", "encoder.layers.{i}."
_GPT2: dict[str, Rule] = {
    "embedding.word_embeddings": (("transformer.wte",), VOCABULARY),
    "embedding.position_embeddings": (("transformer.wpe",), PLAIN),
    _L + "input_layernorm": (("transformer.h.{i}.ln_1",), PLAIN),
    _L + "self_attention.linear_qkv": (("transformer.h.{i}.attn.c_attn",), QKV_CONV1D),
    _L + "self_attention.linear_proj": (("transformer.h.{i}.attn.c_proj",), CONV1D),
    _L + "pre_mlp_layernorm": (("transformer.h.{i}.ln_2",), PLAIN),
    _L + "mlp.linear_fc1": (("transformer.h.{i}.mlp.c_fc",), CONV1D),
    _L + "mlp.linear_fc2": (("transformer.h.{i}.mlp.c_proj",), CONV1D),
    "decoder.final_layernorm": (("transformer.ln_f",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_LLAMA: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.embed_tokens",), VOCABULARY),
    _L + "input_layernorm": (("model.layers.{i}.input_layernorm",), PLAIN),
    _L + "self_attention.linear_qkv": (
        tuple("model.layers.{i}.self_attn." + p + "_proj" for p in "qkv"),
        QKV,
    ),
    _L + "self_attention.linear_proj": (("model.layers.{i}.self_attn.o_proj",), PLAIN),
    _L + "pre_mlp_layernorm": (("model.layers.{i}.post_attention_layernorm",), PLAIN),
    _L + "mlp.linear_fc1": (("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"), GATE_UP),
    _L + "mlp.linear_fc2": (("model.layers.{i}.mlp.down_proj",), PLAIN),
    "decoder.final_layernorm": (("model.norm",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_QWEN3: dict[str, Rule] = {
    **_LLAMA,
    _L + "self_attention.q_layernorm": (("model.layers.{i}.self_attn.q_norm",), QUERY),
    _L + "self_attention.k_layernorm": (("model.layers.{i}.self_attn.k_norm",), PLAIN),
}
_GEMMA: dict[str, Rule] = {
    **_LLAMA,
    _L + "input_layernorm": (("model.layers.{i}.input_layernorm",), GAIN),
    _L + "pre_mlp_layernorm": (("model.layers.{i}.post_attention_layernorm",), GAIN),
    "decoder.final_layernorm": (("model.norm",), GAIN),
}
_GEMMA2: dict[str, Rule] = {
    **_GEMMA,
    _L + "self_attention_branch_norm": (("model.layers.{i}.post_attention_layernorm",), GAIN),
    _L + "pre_mlp_layernorm": (("model.layers.{i}.pre_feedforward_layernorm",), GAIN),
    _L + "mlp_branch_norm": (("model.layers.{i}.post_feedforward_layernorm",), GAIN),
}
_GEMMA3: dict[str, Rule] = {
    **_GEMMA2,
    _L + "self_attention.q_layernorm": (("model.layers.{i}.self_attn.q_norm",), QUERY_GAIN),
    _L + "self_attention.k_layernorm": (("model.layers.{i}.self_attn.k_norm",), GAIN),
}
_X = "gpt_neox.layers.{i}."
_GPT_NEOX: dict[str, Rule] = {
    "embedding.word_embeddings": (("gpt_neox.embed_in",), VOCABULARY),
    _L + "input_layernorm": ((_X + "input_layernorm",), PLAIN),
    _L + "self_attention.linear_qkv": ((_X + "attention.query_key_value",), QKV_FUSED),
    _L + "self_attention.linear_proj": ((_X + "attention.dense",), PLAIN),
    _L + "pre_mlp_layernorm": ((_X + "post_attention_layernorm",), PLAIN),
    _L + "mlp.linear_fc1": ((_X + "mlp.dense_h_to_4h",), PLAIN),
    _L + "mlp.linear_fc2": ((_X + "mlp.dense_4h_to_h",), PLAIN),
    "decoder.final_layernorm": (("gpt_neox.final_layer_norm",), PLAIN),
    "output_layer": (("embed_out",), VOCABULARY),
}
_D = "model.decoder.layers.{i}."
# Post-LN: the norm between the sublayers may be written as the first one's norm_out or as the
# second one's norm_in, see `model/hf/folding/post_ln.py`.
_OPT: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.decoder.embed_tokens",), VOCABULARY),
    "embedding.position_embeddings": (("model.decoder.embed_positions",), POSITIONS_FROM_2),
    _L + "self_attention.linear_qkv": (tuple(_D + "self_attn." + p + "_proj" for p in "qkv"), QKV),
    _L + "self_attention.linear_proj": ((_D + "self_attn.out_proj",), PLAIN),
    _L + "self_attention_output_norm": ((_D + "self_attn_layer_norm",), PLAIN),
    _L + "pre_mlp_layernorm": ((_D + "self_attn_layer_norm",), PLAIN),
    _L + "mlp.linear_fc1": ((_D + "fc1",), PLAIN),
    _L + "mlp.linear_fc2": ((_D + "fc2",), PLAIN),
    _L + "mlp_output_norm": ((_D + "final_layer_norm",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_B, _T = "bert.encoder.layer.{i}.", "cls.predictions.transform."
# What BERT and Megatron's BERT, which differ in where their norms stand, have in common.
_BERTS: dict[str, Rule] = {
    "embedding.word_embeddings": (("bert.embeddings.word_embeddings",), VOCABULARY),
    "embedding.position_embeddings": (("bert.embeddings.position_embeddings",), PLAIN),
    "embedding.tokentype_embeddings": (("bert.embeddings.token_type_embeddings",), PLAIN),
    _E + "self_attention.linear_qkv": (
        tuple(_B + "attention.self." + p for p in ("query", "key", "value")),
        QKV,
    ),
    _E + "self_attention.linear_proj": ((_B + "attention.output.dense",), PLAIN),
    _E + "mlp.linear_fc1": ((_B + "intermediate.dense",), PLAIN),
    _E + "mlp.linear_fc2": ((_B + "output.dense",), PLAIN),
    "head.dense": ((_T + "dense",), PLAIN),
    "head.norm": ((_T + "LayerNorm",), PLAIN),
}
_BERT: dict[str, Rule] = {
    **_BERTS,
    "embedding.norm": (("bert.embeddings.LayerNorm",), PLAIN),
    _E + "self_attention_output_norm": ((_B + "attention.output.LayerNorm",), PLAIN),
    _E + "pre_mlp_layernorm": ((_B + "attention.output.LayerNorm",), PLAIN),
    _E + "mlp_output_norm": ((_B + "output.LayerNorm",), PLAIN),
}
_MEGATRON_BERT: dict[str, Rule] = {
    **_BERTS,
    _E + "input_layernorm": ((_B + "attention.ln",), PLAIN),
    _E + "pre_mlp_layernorm": ((_B + "ln",), PLAIN),
    "encoder.final_layernorm": (("bert.encoder.ln",), PLAIN),
}
# A Llama whose tokens see all others.
_EUROBERT: dict[str, Rule] = {
    module.replace("decoder.", "encoder.", 1): rule for module, rule in _LLAMA.items()
}
_N = "model.layers.{i}."
_MODERNBERT: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.embeddings.tok_embeddings",), VOCABULARY),
    "embedding.norm": (("model.embeddings.norm",), PLAIN),
    _E + "input_layernorm": ((_N + "attn_norm",), PLAIN),
    _E + "self_attention.linear_qkv": ((_N + "attn.Wqkv",), QKV_ROWS),
    _E + "self_attention.linear_proj": ((_N + "attn.Wo",), PLAIN),
    _E + "pre_mlp_layernorm": ((_N + "mlp_norm",), PLAIN),
    _E + "mlp.linear_fc1": ((_N + "mlp.Wi",), PLAIN),
    _E + "mlp.linear_fc2": ((_N + "mlp.Wo",), PLAIN),
    "encoder.final_layernorm": (("model.final_norm",), PLAIN),
    "head.dense": (("head.dense",), PLAIN),
    "head.norm": (("head.norm",), PLAIN),
    "output_layer": (("decoder",), VOCABULARY),
}
_V = "vit.encoder.layer.{i}."
_VIT: dict[str, Rule] = {
    "embedding.patches": (("vit.embeddings.patch_embeddings.projection",), PATCHES),
    _E + "input_layernorm": ((_V + "layernorm_before",), PLAIN),
    _E + "self_attention.linear_qkv": (
        tuple(_V + "attention.attention." + p for p in ("query", "key", "value")),
        QKV,
    ),
    _E + "self_attention.linear_proj": ((_V + "attention.output.dense",), PLAIN),
    _E + "pre_mlp_layernorm": ((_V + "layernorm_after",), PLAIN),
    _E + "mlp.linear_fc1": ((_V + "intermediate.dense",), PLAIN),
    _E + "mlp.linear_fc2": ((_V + "output.dense",), PLAIN),
    "encoder.final_layernorm": (("vit.layernorm",), PLAIN),
    "output_layer": (("classifier",), VOCABULARY),
}
BARE: dict[Target, dict[str, Rule]] = {
    "vit": {
        "embedding.class_token": (("vit.embeddings.cls_token",), BATCHED),
        "embedding.position_embeddings": (("vit.embeddings.position_embeddings",), BATCHED),
    },
    "fathom": {"embedding.class_token": (("class_token",), BATCHED)},
}
"""Tensors that stand by themselves there, without a module."""
_A, _M = "model.layers.{i}.attention.", "model.layers.{i}.mlp."
_FATHOM_LAYER: dict[str, Rule] = {
    "input_layernorm": ((_A + "norm_in",), PLAIN),
    "self_attention.linear_qkv": (tuple(_A + "branch." + p + "_proj" for p in "qkv"), QKV),
    "self_attention.q_layernorm": ((_A + "branch.q_norm",), QUERY),
    **{f"self_attention.{p}_layernorm": ((_A + f"branch.{p}_norm",), PLAIN) for p in "kv"},
    "self_attention.linear_proj": ((_A + "branch.o_proj",), PLAIN),
    "self_attention.linear_proj.input_norm": ((_A + "branch.o_norm",), PLAIN),
    "mlp.linear_fc2.input_norm": ((_M + "branch.down_norm",), PLAIN),
    "self_attention_branch_norm": ((_A + "norm_branch",), PLAIN),
    "self_attention_output_norm": ((_A + "norm_out",), PLAIN),
    "pre_mlp_layernorm": ((_M + "norm_in",), PLAIN),
    "mlp.linear_fc1": ((_M + "branch.gate_proj", _M + "branch.up_proj"), GATE_UP),
    "mlp.linear_fc2": ((_M + "branch.down_proj",), PLAIN),
    "mlp_branch_norm": ((_M + "norm_branch",), PLAIN),
    "mlp_output_norm": ((_M + "norm_out",), PLAIN),
    "gpas": (("model.layers.{i}.gate",), PLAIN),
}
_FATHOM: dict[str, Rule] = {
    "embedding.word_embeddings": (("model.embed_tokens",), VOCABULARY),
    "embedding.position_embeddings": (("model.embed_positions",), PLAIN),
    "embedding.tokentype_embeddings": (("model.embed_types",), PLAIN),
    "embedding.norm": (("model.embed_norm",), PLAIN),
    **{stack + module: rule for stack in (_L, _E) for module, rule in _FATHOM_LAYER.items()},
    "decoder.final_layernorm": (("model.norm",), PLAIN),
    "encoder.final_layernorm": (("model.norm",), PLAIN),
    "embedding.patches": (("patches",), PATCHES),
    "head.dense": (("head.dense",), PLAIN),
    "head.norm": (("head.norm",), PLAIN),
    "output_layer": (("lm_head",), VOCABULARY),
}
_CONVERSIONS = {
    "plain": PLAIN,
    "qkv": QKV,
    "query": QUERY,
    "kv": KV,
    "gate_up": GATE_UP,
    "vocabulary": VOCABULARY,
    "positions_from_2": POSITIONS_FROM_2,
    "frames": FRAMES,
    "last_frames": LAST_FRAMES,
}


def _rules(named: Mapping[str, NamedRule]) -> dict[str, Rule]:
    return {module: (names, _CONVERSIONS[key]) for module, (names, key) in named.items()}


FATHOM_CROSSED, MARIAN_APART = _rules(crossed.FATHOM), _rules(crossed.MARIAN_APART)
TABLES: dict[Target, dict[str, Rule]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "opt": _OPT,
    "bert": _BERT,
    "megatron-bert": _MEGATRON_BERT,
    "eurobert": _EUROBERT,
    "modernbert": _MODERNBERT,
    "mistral": _LLAMA,
    "bart": _rules(crossed.BART),
    "mbart": _rules(crossed.MBART),
    "blenderbot": _rules(crossed.BLENDERBOT),
    "marian": _rules(crossed.MARIAN),
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gpt_neox": _GPT_NEOX,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "vit": _VIT,
    "speech_to_text": _rules(crossed.SPEECH_TO_TEXT),
    "fathom": _FATHOM,
}
_CROSSED_SHOWN: dict[str, bool | int | str] = {"bias": True, "logit_bias": True, "position": "learned"}
SHOWN: dict[Target, dict[str, bool | int | str]] = {
    "gpt2": {"bias": True},
    "bert": {"bias": True, "token_types": 2},
    "megatron-bert": {"bias": True, "token_types": 2},
    **dict.fromkeys(FINAL_BIAS, _CROSSED_SHOWN),
    "marian": {"bias": True, "logit_bias": True},
    "vit": {"bias": True, "logit_bias": True},
    "speech_to_text": {"bias": True},
}
"""What a target always has; zeros where a model has no such tensors, or its fixed positions."""
