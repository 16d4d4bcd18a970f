"""What encoder-decoders call their modules: transformers' classes and our own, as data.

Module name -> (Hugging Face module names, how the tensors are converted, by its key in
`model/hf/mapping.py`). {i} is the 0-based layer of its stack.
"""

from __future__ import annotations

NamedRule = tuple[tuple[str, ...], str]
_E, _D = "encoder.layers.{i}.", "decoder.layers.{i}."


def _attention(module: str, theirs: str, out: str) -> dict[str, NamedRule]:
    return {
        f"{module}.linear_qkv": (tuple(f"{theirs}.{p}_proj" for p in "qkv"), "qkv"),
        f"{module}.linear_q": ((f"{theirs}.q_proj",), "query"),
        f"{module}.linear_kv": ((f"{theirs}.k_proj", f"{theirs}.v_proj"), "kv"),
        f"{module}.linear_proj": ((f"{theirs}.{out}",), "plain"),
    }


def _layers(stack: str) -> dict[str, NamedRule]:
    """What the stock classes have in common."""
    layer = f"model.{stack}.layers.{{i}}."
    return {
        f"{stack}.layers.{{i}}.{module}": rule
        for module, rule in {
            **_attention("self_attention", f"{layer}self_attn", "out_proj"),
            **_attention("cross_attention", f"{layer}encoder_attn", "out_proj"),
            "mlp.linear_fc1": ((f"{layer}fc1",), "plain"),
            "mlp.linear_fc2": ((f"{layer}fc2",), "plain"),
        }.items()
    }


def _norms(stack: str, places: dict[str, str]) -> dict[str, NamedRule]:
    """places: our norm of a layer -> theirs."""
    return {
        f"{stack}.layers.{{i}}.{ours}": ((f"model.{stack}.layers.{{i}}.{theirs}",), "plain")
        for ours, theirs in places.items()
    }


# The norm between two sublayers may be written as the first one's norm_out or as the second one's
# norm_in, see `model/hf/folding/post_ln.py`.
_AFTER = {
    "self_attention_output_norm": "self_attn_layer_norm",
    "mlp_output_norm": "final_layer_norm",
}
_AFTER_ENCODER = {**_AFTER, "pre_mlp_layernorm": "self_attn_layer_norm"}
_AFTER_DECODER = {
    **_AFTER,
    "pre_cross_attn_layernorm": "self_attn_layer_norm",
    "cross_attention_output_norm": "encoder_attn_layer_norm",
    "pre_mlp_layernorm": "encoder_attn_layer_norm",
}
_BEFORE = {
    "input_layernorm": "self_attn_layer_norm",
    "pre_cross_attn_layernorm": "encoder_attn_layer_norm",
    "pre_mlp_layernorm": "final_layer_norm",
}
_LAYERS: dict[str, NamedRule] = {**_layers("encoder"), **_layers("decoder")}
_POST: dict[str, NamedRule] = {
    **_LAYERS,
    **_norms("encoder", _AFTER_ENCODER),
    **_norms("decoder", _AFTER_DECODER),
}
_PRE: dict[str, NamedRule] = {
    **_LAYERS,
    **_norms("encoder", _BEFORE),
    **_norms("decoder", _BEFORE),
    # An encoder's last norm is its last layer's.
    _E + "mlp_output_norm": (("model.encoder.layer_norm",), "plain"),
    "decoder.final_layernorm": (("model.decoder.layer_norm",), "plain"),
}
_SHARED: dict[str, NamedRule] = {"embedding.word_embeddings": (("model.shared",), "vocabulary")}
_NORMED: dict[str, NamedRule] = {
    "embedding.norm": (("model.decoder.layernorm_embedding",), "plain"),
    "source_embedding.norm": (("model.encoder.layernorm_embedding",), "plain"),
}


def _positions(conversion: str) -> dict[str, NamedRule]:
    return {
        "embedding.position_embeddings": (("model.decoder.embed_positions",), conversion),
        "source_embedding.position_embeddings": (("model.encoder.embed_positions",), conversion),
    }


BART: dict[str, NamedRule] = {**_SHARED, **_positions("positions_from_2"), **_NORMED, **_POST}
MBART: dict[str, NamedRule] = {**_SHARED, **_positions("positions_from_2"), **_NORMED, **_PRE}
BLENDERBOT: dict[str, NamedRule] = {**_SHARED, **_positions("plain"), **_PRE}
MARIAN: dict[str, NamedRule] = {**_SHARED, **_POST}
MARIAN_APART: dict[str, NamedRule] = {
    **MARIAN,
    "embedding.word_embeddings": (("model.decoder.embed_tokens",), "vocabulary"),
    "source_embedding.word_embeddings": (("model.encoder.embed_tokens",), "vocabulary"),
}
"""Marian whose encoder and decoder read a table of words each."""


SPEECH_TO_TEXT: dict[str, NamedRule] = {
    "embedding.word_embeddings": (("model.decoder.embed_tokens",), "vocabulary"),
    "source_embedding.first": (("model.encoder.conv.conv_layers.0",), "frames"),
    "source_embedding.second": (("model.encoder.conv.conv_layers.1",), "last_frames"),
    **_PRE,
}


def _own(stack: str) -> dict[str, NamedRule]:
    layer = f"model.{stack}.layers.{{i}}."
    rules: dict[str, NamedRule] = {}
    for kind, part, entrance in (
        ("attention", "self_attention", "input_layernorm"),
        ("cross", "cross_attention", "pre_cross_attn_layernorm"),
        ("mlp", "mlp", "pre_mlp_layernorm"),
    ):
        rules |= {
            entrance: ((f"{layer}{kind}.norm_in",), "plain"),
            f"{part}_branch_norm": ((f"{layer}{kind}.norm_branch",), "plain"),
            f"{part}_output_norm": ((f"{layer}{kind}.norm_out",), "plain"),
        }
        if kind != "mlp":
            rules |= _attention(part, f"{layer}{kind}.branch", "o_proj")
    rules |= {
        **{f"self_attention.{p}_layernorm": ((f"{layer}attention.branch.{p}_norm",), "plain") for p in "qkv"},
        "self_attention.linear_proj.input_norm": ((f"{layer}attention.branch.o_norm",), "plain"),
        "mlp.linear_fc1": ((f"{layer}mlp.branch.gate_proj", f"{layer}mlp.branch.up_proj"), "gate_up"),
        "mlp.linear_fc2": ((f"{layer}mlp.branch.down_proj",), "plain"),
        "mlp.linear_fc2.input_norm": ((f"{layer}mlp.branch.down_norm",), "plain"),
        "gpas": ((f"{layer}gate",), "plain"),
    }
    return {f"{stack}.layers.{{i}}.{module}": rule for module, rule in rules.items()}


FATHOM: dict[str, NamedRule] = {
    **{
        f"{ours}.{module}": ((f"model.{stack}.{theirs}",), conversion)
        for ours, stack in (("embedding", "decoder"), ("source_embedding", "encoder"))
        for module, theirs, conversion in (
            ("word_embeddings", "embed_tokens", "vocabulary"),
            ("position_embeddings", "embed_positions", "plain"),
            ("norm", "embed_norm", "plain"),
        )
    },
    "source_embedding.first": (("model.encoder.first",), "frames"),
    "source_embedding.second": (("model.encoder.second",), "frames"),
    **_own("encoder"),
    **_own("decoder"),
    "decoder.final_layernorm": (("model.decoder.norm",), "plain"),
    "output_layer": (("lm_head",), "vocabulary"),
}
