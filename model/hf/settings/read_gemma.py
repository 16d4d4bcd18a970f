"""config.json of Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from model.hf.names.conversions import GEMMAS
from model.hf.settings.layer_types import window_fields
from model.hf.settings.read import Read
from model.hf.settings.read_decoders import llama_parts
from model.hf.settings.records import ADVICE, Gemma2File, Gemma3File, GemmaFile
from model.hf.settings.refusal import model_config, refuse_first
from model.hf.settings.rope import read_rope
from model.records import as_record
from model.sections import InitConfig
from model.weights.init import logit_scale


def read_gemma(content: Mapping[str, object], kind: str, source: str) -> Read:
    """The model of a config.json of the first Gemma. Arguments and errors as `read_config`."""
    data = as_record(content, GemmaFile, source, ADVICE)
    # Its class reads `gelu` as the tanh approximation.
    name = data.hidden_activation or data.hidden_act
    fields = _common(data, kind, "gelu_pytorch_tanh" if name == "gelu" else name)
    fields |= {
        "scheme": "pre_ln",
        **read_rope(data.rope, data.rope_theta, data.max_position_embeddings, kind, source),
    }
    return _read(kind, fields)


def read_gemma2(content: Mapping[str, object], kind: str, source: str) -> Read:
    """As `read_gemma`, of Gemma 2."""
    data = as_record(content, Gemma2File, source, ADVICE)
    fields = _sandwich(data, kind)
    fields |= read_rope(data.rope, data.rope_theta, data.max_position_embeddings, kind, source)
    fields["attention"] = {"soft_cap": data.attn_logit_softcapping}
    return _read(kind, fields)


def read_gemma3(content: Mapping[str, object], kind: str, source: str) -> Read:
    """As `read_gemma`, of the texts of Gemma 3, whose layers with a window turn by another base."""
    data = as_record(content, Gemma3File, source, ADVICE)
    cap = data.attn_logit_softcapping
    refuse_first(kind, [(cap is not None, f"its scores have a soft cap (attn_logit_softcapping={cap})")])
    fields, longest = _sandwich(data, kind), data.max_position_embeddings
    by_kind = data.rope_parameters or {}
    parts = [by_kind.get(f"{name}_attention") for name in ("full", "sliding")]
    full = parts[0] if isinstance(parts[0], dict) else (data.rope_scaling or {})
    sliding = parts[1] if isinstance(parts[1], dict) else {}
    fields |= read_rope(full, data.rope_theta, longest, kind, source)
    own = read_rope(sliding, data.rope_local_base_freq, longest, kind, source)
    refuse_first(kind, [(bool(own["rotary"]), "its layers with a window have scaled frequencies")])
    if fields.get("global_every") is not None:
        fields["rotary_base_local"] = own["rotary_base"]
    elif "window" in fields:
        fields |= own
    fields["attention"] = {"qk_norm": True}
    return _read(kind, fields)


def _common(data: GemmaFile, kind: str, hidden_activation: str) -> dict[str, object]:
    refuse_first(
        kind,
        [
            (data.attention_bias, "its attention has biases and its feed-forward none (attention_bias)"),
            (
                bool(data.use_bidirectional_attention),
                "its tokens see those after them (use_bidirectional_attention=true)",
            ),
        ],
    )
    return {
        # Words times sqrt(h) on their way in: tied logits have 1 / sqrt(h) of the larger table.
        "init": InitConfig(base="fairseq"),
        **llama_parts(data, kind, hidden_activation),
        "bias": False,
    }


def _sandwich(data: Gemma2File, kind: str) -> dict[str, object]:
    """What Gemma 2 and 3 share: norms around every branch, windows, a cap on the logits."""
    count, scalar = data.num_hidden_layers, data.query_pre_attn_scalar
    windowed = [bool((index + 1) % data.sliding_window_pattern) for index in range(count)]
    if data.layer_types is not None:
        windowed = [name == "sliding_attention" for name in data.layer_types]
    fields = _common(data, kind, data.hidden_activation or data.hidden_act)
    refuse_first(
        kind,
        [
            (
                scalar != fields["head_dim"],
                f"its scores are divided by the root of query_pre_attn_scalar={scalar:g}, not of "
                f"head_dim={fields['head_dim']}",
            )
        ],
    )
    return {
        **fields,
        "scheme": "peri_ln",
        "embedding_norm": False,
        "logit_soft_cap": data.final_logit_softcapping,
        **window_fields(windowed, data.sliding_window, kind),
    }


def _read(kind: str, fields: Mapping[str, object]) -> Read:
    config = model_config(kind, fields)
    factor = math.sqrt(config.hidden_size)
    layout = next(target for target in GEMMAS if target == kind)
    longest = config.max_position_embeddings or 0
    return Read(layout, config, longest, logit_scale(config), word_factor=factor)
