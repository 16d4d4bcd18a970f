"""config.json of decoders beside GPT-2, Llama and OPT."""

from __future__ import annotations

from collections.abc import Mapping

from model.hf.folding.obstacles import LLAMA_ACTIVATIONS, UNGATED_ACTIVATIONS
from model.hf.settings.layer_types import window_fields
from model.hf.settings.records import ADVICE, GPTNeoXFile, LlamaFile, Qwen2File, Qwen3File
from model.hf.settings.refusal import activation, refuse_first
from model.hf.settings.rope import read_rope
from model.hf.settings.write import STOCK_INIT
from model.records import as_record


def llama_parts(data: LlamaFile, kind: str, hidden_act: str) -> dict[str, object]:
    """Our fields of what all classes like Llama say alike: sizes, norms, activation, dropout.

    hidden_act: the activation under transformers' name.
    Raises UserError for an activation that is not ours.
    """
    return {
        "num_layers": data.num_hidden_layers,
        "hidden_size": data.hidden_size,
        "num_attention_heads": data.num_attention_heads,
        "num_query_groups": data.num_key_value_heads or data.num_attention_heads,
        "head_dim": data.head_dim or data.hidden_size // data.num_attention_heads,
        "ffn_hidden_size": data.intermediate_size,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": data.max_position_embeddings,
        "normalization": "rmsnorm",
        "norm_epsilon": data.rms_norm_eps,
        "activation": activation(kind, hidden_act, LLAMA_ACTIVATIONS),
        "position": "rotary",
        "tie_embeddings": data.tie_word_embeddings,
        "attention_dropout": data.attention_dropout or 0.0,
    }


def qwen_fields(content: Mapping[str, object], kind: str, source: str) -> tuple[dict[str, object], int]:
    """Our fields of a Qwen 2 or Qwen 3, and its longest sequence.

    Raises UserError for what is not ours: windows in uneven layers, biases of all attention's
    matrices alone.
    """
    data = as_record(content, Qwen2File if kind == "qwen2" else Qwen3File, source, ADVICE)
    layers = data.num_hidden_layers
    windows = data.use_sliding_window and data.sliding_window is not None
    windowed = [windows and index >= data.max_window_layers for index in range(layers)]
    if data.layer_types is not None:
        windowed = [windows and name == "sliding_attention" for name in data.layer_types]
    biased = data.attention_bias
    refuse_first(
        kind,
        [
            (bool(biased), "its attention has biases and its feed-forward none (attention_bias=true)"),
        ],
    )
    attention = {"qkv_bias": True} if kind == "qwen2" else {"qk_norm": True}
    longest = data.max_position_embeddings
    return {
        "scheme": "pre_ln",
        "init": STOCK_INIT,
        **llama_parts(data, kind, data.hidden_act),
        **read_rope(data.rope, data.rope_theta, longest, kind, source),
        "attention": attention,
        **window_fields(windowed, data.sliding_window, kind),
        "bias": False,
    }, longest


def neox_fields(content: Mapping[str, object], kind: str, source: str) -> tuple[dict[str, object], int]:
    """Our fields of a GPT-NeoX (Pythia), and its longest sequence.

    Raises UserError for what is not ours, above all sublayers side by side.
    """
    data = as_record(content, GPTNeoXFile, source, ADVICE)
    refuse_first(
        kind,
        [
            (
                data.use_parallel_residual,
                "its feed-forward reads what attention reads, not what attention adds to "
                "(use_parallel_residual=true, as in Pythia); our sublayers follow each other",
            ),
            (
                not data.attention_bias,
                "its feed-forward has biases and its attention none (attention_bias)",
            ),
        ],
    )
    share = data.rotary_pct if data.rotary_pct is not None else 0.25
    rope = {"partial_rotary_factor": share, **data.rope}
    longest = data.max_position_embeddings
    return {
        "scheme": "pre_ln",
        "init": STOCK_INIT,
        "num_layers": data.num_hidden_layers,
        "hidden_size": data.hidden_size,
        "num_attention_heads": data.num_attention_heads,
        "ffn_hidden_size": data.intermediate_size,
        "vocab_size": data.vocab_size,
        "max_position_embeddings": longest,
        "norm_epsilon": data.layer_norm_eps,
        "activation": activation(kind, data.hidden_act, UNGATED_ACTIVATIONS),
        "position": "rotary",
        **read_rope(rope, data.rotary_emb_base, longest, kind, source),
        "tie_embeddings": data.tie_word_embeddings,
        "hidden_dropout": data.hidden_dropout,
        "attention_dropout": data.attention_dropout,
    }, longest
