"""config.json, written for a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from model.config import ModelConfig
from model.errors import UserError
from model.hf.folding.obstacles import LLAMA_ACTIVATIONS, UNGATED_ACTIVATIONS
from model.hf.folding.pre_ln import Fold
from model.hf.mapping import norm_layers
from model.hf.names.conversions import COLOURS, FINAL_BIAS, Target
from model.hf.names.tables import SHOWN
from model.hf.packaging import packaging
from model.hf.settings.rope import write_rope
from model.hf.settings.write_fathom import fathom_fields, sizes
from model.sections import InitConfig
from model.speech import FRAMES_PER_TOKEN, KERNEL

STOCK: dict[Target, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "bert": "BertForMaskedLM",
    "megatron-bert": "MegatronBertForMaskedLM",
    "eurobert": "EuroBertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "mistral": "MistralForCausalLM",
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "blenderbot": "BlenderbotForConditionalGeneration",
    "marian": "MarianMTModel",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "vit": "ViTForImageClassification",
    "speech_to_text": "Speech2TextForConditionalGeneration",
}
"""Classes of transformers."""
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that begin and end a text and fill up, by their names in config.json."""
START = "decoder_start_token_id"
"""What a decoder over an encoder reads before the first token of its text."""
# The initialisation under which tied embeddings have no factor on the logits,
# as in all stock architectures.
STOCK_INIT = InitConfig(base="normal")


def architecture(target: Target, config: ModelConfig) -> str:
    """Name of the class that computes a model."""
    return STOCK.get(target) or packaging(config).own


def write_config(
    target: Target,
    config: ModelConfig,
    fold: Fold,
    *,
    positions: int,
    logit_scale: float,
    dtype: str,
    special: Mapping[str, object],
) -> dict[str, object]:
    """Contents of config.json.

    special: an id, or None where it is not known, for each of SPECIAL, and START where there are
        two stacks.
    Raises UserError where a stock class is not told START, for which it has a number of its own.
    """
    if target in (*FINAL_BIAS, "speech_to_text") and special.get(START) is None:
        raise UserError(
            f"{START} is not known, and without it {STOCK[target]} starts a text from a token of its own: "
            "export with a tokenizer, or with --architecture fathom"
        )
    common = {
        "architectures": [architecture(target, config)],
        "model_type": target,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": config.blueprint.stacks[-1].causal,
        # transformers 5 reads the first, older ones the second.
        "dtype": dtype,
        "torch_dtype": dtype,
        **special,
    }
    return {**common, **FIELDS[target](config, fold, positions, logit_scale)}


def _gpt2(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        "n_positions": positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "activation_function": UNGATED_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": fold.epsilon,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
    }


def _llama(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        **sizes(config, positions),
        "num_key_value_heads": config.groups,
        "head_dim": config.kv_channels,
        "hidden_act": LLAMA_ACTIVATIONS[config.activation],
        "rms_norm_eps": fold.epsilon,
        # transformers 5 reads the first, older ones the second,
        # and each falls back to 10000 without it.
        "rope_parameters": write_rope(config),
        "rope_theta": float(config.rotary_base),
        **({} if config.rotary.scaling == "none" else {"rope_scaling": write_rope(config)}),
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.attention_dropout,
    }


def _mistral(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    # Its number counts the token itself.
    window = None if config.window is None else config.window + 1
    return {**_llama(config, fold, positions, logit_scale), "sliding_window": window}


def _qwen(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    """Biases are what the class has, and no field of it."""
    fields = _llama(config, fold, positions, logit_scale)
    del fields["mlp_bias"]
    windows = {"max_window_layers": 0, **_windows(config)} if config.window is not None else {}
    return {**fields, "use_sliding_window": config.window is not None, **windows}


def _windows(config: ModelConfig) -> dict[str, object]:
    """Which layers see a window. Its size counts the token itself."""
    kinds = ("full_attention", "sliding_attention")
    return {
        "sliding_window": None if config.window is None else config.window + 1,
        "layer_types": [kinds[config.is_local(layer)] for layer in range(config.num_layers)],
    }


def _gemma(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    fields = _llama(config, fold, positions, logit_scale)
    del fields["mlp_bias"]
    return {**fields, "hidden_activation": fields["hidden_act"]}


def _gemma2(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    windows = _windows(config)
    return {
        **_gemma(config, fold, positions, logit_scale),
        **windows,
        # Those classes make the mask of a window also where no layer reads it.
        "sliding_window": windows["sliding_window"] or positions,
        "query_pre_attn_scalar": config.kv_channels,
        "attn_logit_softcapping": config.attention.soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "use_bidirectional_attention": False,
    }


def _gemma3(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    fields, everywhere = _gemma2(config, fold, positions, logit_scale), write_rope(config)
    local = config.rotary_base_local
    own = everywhere if local is None else {"rope_type": "default", "rope_theta": float(local)}
    for older in ("rope_theta", "rope_scaling"):
        fields.pop(older, None)
    return {**fields, "rope_parameters": {"full_attention": everywhere, "sliding_attention": own}}


def _gpt_neox(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        **sizes(config, positions),
        "hidden_act": UNGATED_ACTIVATIONS[config.activation],
        "layer_norm_eps": fold.epsilon,
        "rope_parameters": {**write_rope(config), "partial_rotary_factor": config.rotary.share},
        # Older versions read these in its place.
        "rotary_pct": config.rotary.share,
        "rotary_emb_base": float(config.rotary_base),
        "use_parallel_residual": False,
        "attention_bias": True,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
    }


def _modernbert(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    bases = {
        "full_attention": float(config.rotary_base),
        "sliding_attention": float(config.rotary_base_local or config.rotary_base),
    }
    kinds = ("full_attention", "sliding_attention")
    return {
        **sizes(config, positions),
        "hidden_activation": LLAMA_ACTIVATIONS[config.activation],
        "classifier_activation": LLAMA_ACTIVATIONS[config.activation],
        "norm_eps": fold.epsilon,
        "norm_bias": True,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "classifier_bias": config.bias,
        "decoder_bias": True,
        "layer_types": [kinds[config.is_local(layer)] for layer in range(config.num_layers)],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        },
        # Older versions read these in their place.
        "global_attn_every_n_layers": config.global_every or 1,
        "global_rope_theta": bases["full_attention"],
        "local_rope_theta": bases["sliding_attention"],
        # Both sides together.
        "local_attention": 2 * (config.window or positions),
        "embedding_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "mlp_dropout": 0.0,
    }


def _opt(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        "max_position_embeddings": positions,
        "hidden_size": config.hidden_size,
        "word_embed_proj_dim": config.hidden_size,
        "ffn_dim": config.ffn_size,
        "num_hidden_layers": config.num_layers + sum(norm_layers("opt", config)),
        "num_attention_heads": config.num_attention_heads,
        "activation_function": UNGATED_ACTIVATIONS[config.activation],
        "do_layer_norm_before": False,
        "layer_norm_elementwise_affine": True,
        "enable_bias": config.bias,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "layerdrop": 0.0,
    }


def _bert(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        **sizes(config, positions),
        "hidden_act": UNGATED_ACTIVATIONS[config.activation],
        "layer_norm_eps": fold.epsilon,
        "type_vocab_size": SHOWN["bert"]["token_types"],
        # What the class has always; other programs ask.
        "position_embedding_type": "absolute",
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


def _crossed(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    encoder, decoder = (config.of(stack) for stack in config.blueprint.stacks)
    return {
        "is_encoder_decoder": True,
        "d_model": config.hidden_size,
        "encoder_layers": encoder.num_layers,
        "decoder_layers": decoder.num_layers,
        "encoder_attention_heads": encoder.num_attention_heads,
        "decoder_attention_heads": decoder.num_attention_heads,
        "encoder_ffn_dim": encoder.ffn_size,
        "decoder_ffn_dim": decoder.ffn_size,
        "max_position_embeddings": max(positions, config.max_source_positions or 0),
        "activation_function": UNGATED_ACTIVATIONS[config.activation],
        "scale_embedding": False,
        "dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        # What these classes would do when they generate, unless told otherwise.
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }


def _bart(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    # The class has these built in. Published folders name them, and other programs read them there.
    norms = {"normalize_before": False, "normalize_embedding": True}
    return {**_crossed(config, fold, positions, logit_scale), **norms}


def _mbart(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        **_bart(config, fold, positions, logit_scale),
        "normalize_before": True,
        # Without it CTranslate2 expects texts to start with the name of a language.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _blenderbot(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {**_crossed(config, fold, positions, logit_scale), "encoder_no_repeat_ngram_size": 0}


def _marian(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    return {
        **_crossed(config, fold, positions, logit_scale),
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": config.share_embeddings,
    }


def _speech_to_text(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    speech = config.speech
    assert speech is not None
    shared = _crossed(config, fold, positions, logit_scale)
    del shared["max_position_embeddings"]
    return {
        **shared,
        "max_source_positions": FRAMES_PER_TOKEN * (config.max_source_positions or 0),
        "max_target_positions": positions,
        "num_conv_layers": 2,
        "conv_kernel_sizes": [KERNEL, KERNEL],
        "conv_channels": speech.channels,
        "input_feat_per_channel": speech.filters,
        "input_channels": 1,
        # Positions are counted from the one after it, and it has none itself.
        "pad_token_id": config.blueprint.sinusoid.first - 1,
    }


def _vit(config: ModelConfig, fold: Fold, positions: int, logit_scale: float) -> dict[str, object]:
    image = config.image
    assert image is not None
    return {
        "image_size": [image.height, image.columns],
        "patch_size": image.patch,
        "num_channels": COLOURS if image.channels == 1 else image.channels,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": UNGATED_ACTIVATIONS[config.activation],
        "layer_norm_eps": fold.epsilon,
        "qkv_bias": True,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
    }


FIELDS: dict[Target, Callable[[ModelConfig, Fold, int, float], dict[str, object]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "opt": _opt,
    "bert": _bert,
    "megatron-bert": _bert,
    "eurobert": _llama,
    "modernbert": _modernbert,
    "mistral": _mistral,
    "bart": _bart,
    "mbart": _mbart,
    "blenderbot": _blenderbot,
    "marian": _marian,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gpt_neox": _gpt_neox,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "vit": _vit,
    "speech_to_text": _speech_to_text,
    "fathom": fathom_fields,
}
"""What config.json of a target says beside what all of them say."""
