"""config.json of transformers' encoder-decoders, with a reason for all that is not ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from model.hf.folding.obstacles import UNGATED_ACTIVATIONS
from model.hf.names.conversions import OPT_EPSILON, Target
from model.hf.settings.read import Read
from model.hf.settings.records import ADVICE, BlenderbotFile, CrossedFile, MarianFile
from model.hf.settings.refusal import activation, model_config, refuse_first
from model.hf.settings.write import STOCK_INIT
from model.records import as_record
from model.sections import InitConfig


class _Form(NamedTuple):
    """Where the norms of a class stand, and its positions."""

    layout: Target
    scheme: str
    embedding_norm: bool
    position: str = "learned"
    record: type[CrossedFile] = CrossedFile


FORMS = {
    "bart": _Form("bart", "post_ln", True),
    "mbart": _Form("mbart", "pre_ln", True),
    "blenderbot": _Form("blenderbot", "pre_ln", False, record=BlenderbotFile),
    "marian": _Form("marian", "post_ln", False, "sinusoidal", MarianFile),
}
T5 = (
    "its attention adds a learned bias by relative position to the scores, which are not divided by the "
    "root of the head width; of encoder-decoders, " + ", ".join(FORMS) + " and fathom are read"
)
REFUSED = dict.fromkeys(("t5", "mt5", "umt5", "longt5"), T5)
"""Kinds that are told why."""


def read_crossed(content: Mapping[str, object], kind: str, source: str) -> Read:
    """The model of a config.json. Arguments and errors as `read_config`."""
    form = FORMS[kind]
    data = as_record(content, form.record, source, ADVICE)
    other = data.decoder_vocab_size
    refuse_first(
        kind,
        [
            (data.is_decoder, "it is a decoder by itself (is_decoder=true)"),
            (
                not data.tie_word_embeddings,
                "its output projection is a matrix of its own (tie_word_embeddings=false)",
            ),
            (
                other is not None and other != data.vocab_size,
                f"its decoder has another vocabulary (decoder_vocab_size={other}) than its encoder "
                f"(vocab_size={data.vocab_size})",
            ),
            (
                data.activation_dropout != 0,
                f"its feed-forwards drop inside (activation_dropout={data.activation_dropout}); "
                "set activation_dropout to 0 in config.json",
            ),
            (
                data.encoder_layerdrop != 0 or data.decoder_layerdrop != 0,
                "it leaves layers out in training (encoder_layerdrop, decoder_layerdrop); "
                "set both to 0 in config.json",
            ),
        ],
    )
    fields = {
        "family": "seq2seq",
        "scheme": form.scheme,
        "init": _init(form, scaled=data.scale_embedding),
        "num_layers": data.decoder_layers,
        "encoder_layers": data.encoder_layers,
        "hidden_size": data.d_model,
        "num_attention_heads": data.decoder_attention_heads,
        "encoder_attention_heads": data.encoder_attention_heads,
        "ffn_hidden_size": data.decoder_ffn_dim,
        "encoder_ffn_hidden_size": data.encoder_ffn_dim,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.max_position_embeddings,
        "max_source_positions": data.max_position_embeddings,
        "norm_epsilon": OPT_EPSILON,
        "activation": activation(kind, data.activation_function, UNGATED_ACTIVATIONS),
        "position": form.position,
        "embedding_norm": form.embedding_norm,
        "share_embeddings": data.share_encoder_decoder_embeddings,
        "logit_bias": True,
        "hidden_dropout": data.dropout,
        "attention_dropout": data.attention_dropout,
    }
    factor = math.sqrt(data.d_model) if data.scale_embedding else 1.0
    config = model_config(kind, fields)
    return Read(form.layout, config, data.max_position_embeddings, 1 / factor, word_factor=factor)


def _init(form: _Form, *, scaled: bool) -> InitConfig:
    """The initialisation under which logits and fixed positions have the factors of the files.

    With words times sqrt(h) on their way in, tied logits have 1 / sqrt(h) of the larger table, as
    under base fairseq. Without, both factors are 1 under base normal, of sines by this deviation.
    """
    if scaled:
        return InitConfig(base="fairseq")
    return InitConfig(base="normal", std=math.sqrt(0.5)) if form.position == "sinusoidal" else STOCK_INIT
