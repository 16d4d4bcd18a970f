"""config.json, read with a reason for everything that is not ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from model.config import ModelConfig
from model.errors import UserError
from model.hf.folding.obstacles import LLAMA_ACTIVATIONS, UNGATED_ACTIVATIONS
from model.hf.folding.pre_ln import Fold
from model.hf.names.conversions import OPT_EPSILON, Target
from model.hf.settings.read_decoders import llama_parts, neox_fields, qwen_fields
from model.hf.settings.read_images import image_fields
from model.hf.settings.records import (
    ADVICE,
    BertFile,
    EuroBertFile,
    FathomFile,
    GPT2File,
    Kind,
    LlamaFile,
    MistralFile,
    ModernBertFile,
    OPTFile,
)
from model.hf.settings.refusal import activation, model_config, refuse, refuse_first
from model.hf.settings.rope import read_rope
from model.hf.settings.write import STOCK_INIT
from model.hf.settings.write_fathom import fathom_fields
from model.records import as_record
from model.words import printable


class Read(NamedTuple):
    """What a config.json says."""

    layout: Target
    """Whose names the weight files use."""
    config: ModelConfig
    positions: int
    """Rows of the position table, or the longest sequence."""
    logit_scale: float
    norm_bias: bool = True
    """Whether the weight files have the biases of norms; they are zero where not."""
    word_factor: float = 1.0
    """On the tables of words of the files, which their model multiplies on the way in alone."""


OTHERS = {
    **dict.fromkeys(
        ("olmo2", "olmo3"),
        "it norms what its sublayers add and not what they read, and queries and keys of all heads together",
    ),
    "gpt_oss": "its feed-forwards are mixtures of experts, and each head of its attention has a learned "
    "score beside those of the keys (attention sinks)",
    "gemma3": "it reads images too: save its language model by itself (gemma3_text)",
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), "its feed-forwards are mixtures of experts"),
}
"""Kinds of decoders that are told why they are not read."""


def read_config(content: object, source: str) -> Read:
    """The model that the parsed content of a config.json describes. source: the file, for messages.

    Raises UserError with the first reason why it is not one of our models.
    """
    from model.hf.settings.read_crossed import FORMS, REFUSED, read_crossed
    from model.hf.settings.read_gemma import read_gemma, read_gemma2, read_gemma3

    kind = as_record(content, Kind, source, ADVICE).model_type
    assert isinstance(content, dict)
    readers = {
        "gpt2": _read_gpt2,
        "llama": _read_llama,
        "mistral": _read_mistral,
        "qwen2": _read_decoder,
        "qwen3": _read_decoder,
        "gpt_neox": _read_decoder,
        "gemma": read_gemma,
        "gemma2": read_gemma2,
        "gemma3_text": read_gemma3,
        "opt": _read_opt,
        "bert": _read_bert,
        "megatron-bert": _read_bert,
        "eurobert": _read_eurobert,
        "modernbert": _read_modernbert,
        **dict.fromkeys(FORMS, read_crossed),
        "vit": _read_vit,
        "fathom": _read_fathom,
    }
    reason = {**REFUSED, **OTHERS}.get(str(kind))
    if reason is not None:
        raise refuse(str(kind), reason)
    if kind not in readers:
        shown = printable(repr(kind), 60)
        raise UserError(f"model_type={shown} cannot be imported; supported: {', '.join(readers)}")
    return readers[kind](content, kind, source)


def _read_gpt2(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, GPT2File, source, ADVICE)
    refuse_first(
        kind,
        [
            (
                not data.scale_attn_weights,
                "its attention is not scaled by 1/sqrt(head width) (scale_attn_weights=false)",
            ),
            (
                data.scale_attn_by_inverse_layer_idx,
                "its attention is scaled by the layer number (scale_attn_by_inverse_layer_idx)",
            ),
            (data.add_cross_attention, "it has cross-attention"),
            (
                data.resid_pdrop != data.embd_pdrop,
                f"resid_pdrop={data.resid_pdrop} and embd_pdrop={data.embd_pdrop} differ, "
                "hidden_dropout is one number; make them equal in config.json",
            ),
        ],
    )
    fields = {
        "scheme": "pre_ln",
        "init": STOCK_INIT,
        "num_layers": data.n_layer,
        "hidden_size": data.n_embd,
        "num_attention_heads": data.n_head,
        "ffn_hidden_size": data.n_inner or 4 * data.n_embd,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.n_positions,
        "norm_epsilon": data.layer_norm_epsilon,
        "activation": activation(kind, data.activation_function, UNGATED_ACTIVATIONS),
        "tie_embeddings": data.tie_word_embeddings,
        "hidden_dropout": data.resid_pdrop,
        "attention_dropout": data.attn_pdrop,
    }
    return Read("gpt2", model_config(kind, fields), data.n_positions, 1.0)


def _read_llama(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, LlamaFile, source, ADVICE)
    window = data.sliding_window
    refuse_first(kind, [(window is not None, f"it has sliding-window attention ({window} tokens)")])
    fields = _llama_fields(data, kind, source)
    return Read("llama", model_config(kind, fields), data.max_position_embeddings, 1.0)


def _read_mistral(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, MistralFile, source, ADVICE)
    fields, window = _llama_fields(data, kind, source), data.sliding_window
    if window is None:
        return Read("llama", model_config(kind, fields), data.max_position_embeddings, 1.0)
    refuse_first(
        kind,
        [
            (window == 1, "its tokens see themselves only (sliding_window=1)"),
            (data.attention_bias, "it has biases in its linear layers (attention_bias=true)"),
        ],
    )
    # Its number counts the token itself.
    fields["window"] = window - 1
    return Read("mistral", model_config(kind, fields), data.max_position_embeddings, 1.0)


_DECODERS: dict[str, tuple[Target, Callable[..., tuple[dict[str, object], int]]]] = {
    "qwen2": ("qwen2", qwen_fields),
    "qwen3": ("qwen3", qwen_fields),
    "gpt_neox": ("gpt_neox", neox_fields),
}


def _read_decoder(content: Mapping[str, object], kind: str, source: str) -> Read:
    layout, fields_of = _DECODERS[kind]
    fields, longest = fields_of(content, kind, source)
    return Read(layout, model_config(kind, fields), longest, 1.0)


def _read_eurobert(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, EuroBertFile, source, ADVICE)
    fields = _llama_fields(data, kind, source)
    fields |= {"family": "bert", "plain_head": True, "logit_bias": data.mlp_bias}
    return Read("eurobert", model_config(kind, fields), data.max_position_embeddings, 1.0)


def _llama_fields(data: LlamaFile, kind: str, source: str) -> dict[str, object]:
    refuse_first(
        kind,
        [
            (
                data.attention_bias != data.mlp_bias,
                f"attention_bias={data.attention_bias} and mlp_bias={data.mlp_bias} differ, "
                "bias is one switch here",
            ),
        ],
    )
    return {
        "scheme": "pre_ln",
        "init": STOCK_INIT,
        **llama_parts(data, kind, data.hidden_act),
        **_rope(data, kind, source),
        "bias": data.attention_bias,
    }


def _rope(data: LlamaFile, kind: str, source: str) -> dict[str, object]:
    """The rotary embedding, over whole heads as in all these classes.

    Raises UserError where it is of a kind that we have not.
    """
    given = data.rope
    part = given.get("partial_rotary_factor", data.partial_rotary_factor)
    whole = part in (None, 1.0)
    refuse_first(kind, [(not whole, "only a part of each head is rotated (partial_rotary_factor)")])
    return read_rope(given, data.rope_theta, data.max_position_embeddings, kind, source)


def _read_opt(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, OPTFile, source, ADVICE)
    hidden = data.hidden_size
    width = data.word_embed_proj_dim or hidden
    refuse_first(
        kind,
        [
            (
                data.do_layer_norm_before,
                "its norms stand before the sublayers (do_layer_norm_before=true); "
                "only post-LN ones are read",
            ),
            (
                width != hidden,
                f"its embeddings are {width} wide and projected to hidden_size={hidden} "
                "(word_embed_proj_dim)",
            ),
            (
                not data.layer_norm_elementwise_affine,
                "its norms have no gain and bias (layer_norm_elementwise_affine=false)",
            ),
            (
                data.layerdrop != 0,
                f"it leaves layers out in training (layerdrop={data.layerdrop}); "
                "set layerdrop to 0 in config.json",
            ),
        ],
    )
    fields = {
        "scheme": "post_ln",
        "init": STOCK_INIT,
        "num_layers": data.num_hidden_layers,
        "hidden_size": hidden,
        "num_attention_heads": data.num_attention_heads,
        "ffn_hidden_size": data.ffn_dim,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.max_position_embeddings,
        "norm_epsilon": OPT_EPSILON,
        "activation": activation(kind, data.activation_function, UNGATED_ACTIVATIONS),
        "tie_embeddings": data.tie_word_embeddings,
        "bias": data.enable_bias,
        "hidden_dropout": data.dropout,
        "attention_dropout": data.attention_dropout,
    }
    return Read("opt", model_config(kind, fields), data.max_position_embeddings, 1.0)


# Where the norms of a BERT stand: (target, scheme, norm after the embedding).
_BERT_FORMS: dict[str, tuple[Target, str, bool]] = {
    "bert": ("bert", "post_ln", True),
    "megatron-bert": ("megatron-bert", "pre_ln", False),
}


def _read_bert(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, BertFile, source, ADVICE)
    positions = data.position_embedding_type
    refuse_first(
        kind,
        [
            (
                data.is_decoder or data.add_cross_attention,
                "it is a decoder (is_decoder, add_cross_attention)",
            ),
            (
                positions not in (None, "absolute"),
                f"its positions are {printable(positions, 60)} (position_embedding_type); "
                "only absolute ones are read",
            ),
            (
                data.type_vocab_size != 2,
                f"it has {data.type_vocab_size} token types (type_vocab_size); only 2 are read",
            ),
            (
                not data.tie_word_embeddings,
                "its output projection is a matrix of its own (tie_word_embeddings=false)",
            ),
        ],
    )
    layout, scheme, embedding_norm = _BERT_FORMS[kind]
    fields = {
        "family": "bert",
        "scheme": scheme,
        "init": STOCK_INIT,
        "num_layers": data.num_hidden_layers,
        "hidden_size": data.hidden_size,
        "num_attention_heads": data.num_attention_heads,
        "ffn_hidden_size": data.intermediate_size,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.max_position_embeddings,
        "token_types": 2,
        "embedding_norm": embedding_norm,
        "norm_epsilon": data.layer_norm_eps,
        "activation": activation(kind, data.hidden_act, UNGATED_ACTIVATIONS),
        "hidden_dropout": data.hidden_dropout_prob,
        "attention_dropout": data.attention_probs_dropout_prob,
    }
    return Read(layout, model_config(kind, fields), data.max_position_embeddings, 1.0)


def _read_vit(content: Mapping[str, object], kind: str, source: str) -> Read:
    config = model_config(kind, image_fields(content, kind, source))
    assert config.image is not None
    return Read("vit", config, config.image.tokens, 1.0)


def _read_modernbert(content: Mapping[str, object], kind: str, source: str) -> Read:
    data = as_record(content, ModernBertFile, source, ADVICE)
    biases = {data.attention_bias, data.mlp_bias, data.classifier_bias}
    refuse_first(
        kind,
        [
            (
                len(biases) > 1,
                f"attention_bias={data.attention_bias}, mlp_bias={data.mlp_bias} and "
                f"classifier_bias={data.classifier_bias} differ, bias is one switch here",
            ),
            (not data.decoder_bias, "its logits have no bias (decoder_bias=false)"),
            (
                data.classifier_activation != data.hidden_activation,
                f"its head's activation is {printable(data.classifier_activation, 60)}, its layers' "
                f"{printable(data.hidden_activation, 60)}",
            ),
            (
                data.mlp_dropout != 0,
                f"its feed-forwards drop inside (mlp_dropout={data.mlp_dropout}); "
                "set mlp_dropout to 0 in config.json",
            ),
        ],
    )
    every = _global_every(data, kind)
    given = data.rope_parameters or {}
    bases = {
        name: _plain_base(
            {**(data.rope_scaling or {}), **(given.get(f"{name}_attention") or {})}, theta, kind, source
        )
        for name, theta in (("full", data.global_rope_theta), ("sliding", data.local_rope_theta))
    }
    fields = {
        "family": "bert",
        "scheme": "pre_ln",
        "init": STOCK_INIT,
        "num_layers": data.num_hidden_layers,
        "hidden_size": data.hidden_size,
        "num_attention_heads": data.num_attention_heads,
        "ffn_hidden_size": data.intermediate_size,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.max_position_embeddings,
        "embedding_norm": True,
        "first_norm": False,
        "norm_epsilon": data.norm_eps,
        "activation": activation(kind, data.hidden_activation, LLAMA_ACTIVATIONS),
        "position": "rotary",
        "rotary_base": bases["full"],
        "window": None if every is None else data.local_attention // 2,
        "global_every": every,
        "rotary_base_local": None if every is None else bases["sliding"],
        "tie_embeddings": data.tie_word_embeddings,
        "bias": data.attention_bias,
        "hidden_dropout": data.embedding_dropout,
        "attention_dropout": data.attention_dropout,
    }
    config = model_config(kind, fields)
    return Read("modernbert", config, data.max_position_embeddings, 1.0, norm_bias=data.norm_bias)


def _plain_base(given: dict[str, object], theta: float, kind: str, source: str) -> object:
    """Base of a rotary embedding that is plain. Raises UserError for another."""
    read = read_rope(given, theta, 1, kind, source)
    refuse_first(
        kind,
        [(bool(read["rotary"]), f"its rotary embedding is scaled ({printable(str(read['rotary']), 200)})")],
    )
    return read["rotary_base"]


def _global_every(data: ModernBertFile, kind: str) -> int | None:
    """Of how many layers the first sees everything; None where all do.

    Raises UserError for another pattern.
    """
    count = data.num_hidden_layers
    every = data.global_attn_every_n_layers
    if data.layer_types is not None:
        whole = [index for index, name in enumerate(data.layer_types) if name == "full_attention"]
        every = next((index for index in whole if index), max(count, 2))
        names = ["sliding_attention" if index % every else "full_attention" for index in range(count)]
        refuse_first(
            kind,
            [
                (
                    data.layer_types != names,
                    "its layers with a window do not follow each other evenly (layer_types)",
                )
            ],
        )
    return None if every == 1 or count == 1 else every


def _read_fathom(content: Mapping[str, object], kind: str, source: str) -> Read:
    from model.hf.remote.configuration_fathom import FathomConfig

    data = as_record(content, FathomFile, source, ADVICE)
    if not data.pretraining:
        raise refuse(kind, "its config.json has no `pretraining` section")
    # Before the section builds as many layers as it says.
    if (layers := data.pretraining.get("num_layers")) != data.num_hidden_layers:
        raise _contradiction("num_hidden_layers", data.num_hidden_layers, layers)
    if (layers := data.pretraining.get("encoder_layers")) not in (None, data.encoder_layers):
        raise _contradiction("encoder_layers", data.encoder_layers, layers)
    config = model_config(kind, data.pretraining)
    # The section must describe the very model that config.json makes transformers build.
    built = fathom_fields(
        config, Fold({}, config.norm_epsilon), data.max_position_embeddings, data.logit_scale
    )
    del built["auto_map"], built["pretraining"]
    built |= {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    defaults = FathomConfig()
    for key, expected in built.items():
        given = content.get(key)
        given = getattr(defaults, key) if given is None else given
        if given != expected:
            raise _contradiction(key, given, expected)
    return Read("fathom", config, data.max_position_embeddings, data.logit_scale)


def _contradiction(key: str, given: object, expected: object) -> UserError:
    shown, wanted = printable(repr(given), 200), printable(repr(expected), 200)
    problem = f"config.json has {key}={shown}, but its `pretraining` section gives {wanted}"
    return UserError(f"this fathom model cannot be imported: {problem}")
