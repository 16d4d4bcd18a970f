"""Rotary embeddings in config.json, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping

from model.config import ModelConfig
from model.hf.settings.records import ADVICE, Rope
from model.hf.settings.refusal import refuse_first
from model.records import as_record
from model.words import printable

# Our field -> theirs, by kind of scaling.
_ORIGINAL = {"factor": "factor", "original_positions": "original_max_position_embeddings"}
SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {**_ORIGINAL, "low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor"},
    "yarn": {
        **_ORIGINAL,
        **{name: name for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")},
    },
}
_OTHERS = {
    "dynamic": "its frequencies change with the length of the text; up to max_position_embeddings they are "
    "plain ones: set rope_type to default to train at most that long",
    "longrope": "each of its frequencies has a factor of its own, another one for long texts",
}


def read_rope(
    given: Mapping[str, object], theta: float | None, longest: int, kind: str, source: str
) -> dict[str, object]:
    """Our fields of a section: base, share and scaling.

    theta: the base that stands outside of it. longest: positions of the model.
    Raises UserError for a rotation that we have not.
    """
    rope = as_record(dict(given), Rope, f"{source}, rope_parameters", ADVICE)
    scaling = rope.rope_type or rope.type or "default"
    base = rope.rope_theta or theta or 10000.0
    names = SCALINGS.get(scaling, {})
    unread = [
        printable(key, 60)
        for key, value in given.items()
        if value is not None and key not in (*_PLAIN, *_MSCALES, *names.values())
    ]
    reason = _OTHERS.get(scaling)
    needs_factor = scaling in ("linear", "llama3")
    shown = printable(scaling, 60)
    refuse_first(
        kind,
        [
            (reason is not None, f"its rotary embedding is scaled (rope_type={shown}): {reason}"),
            (scaling not in ("default", *SCALINGS), f"its rotary embedding is scaled (rope_type={shown})"),
            (
                needs_factor and rope.factor is None,
                f"it has no factor ({shown})",
            ),
            (base != int(base), f"its rotary base {base} is not a whole number"),
            (bool(unread), f"its rotary embedding has {', '.join(unread)}, which is not read"),
        ],
    )
    rotary: dict[str, object] = {} if scaling == "default" else _scaling(rope, scaling, longest)
    if rope.partial_rotary_factor is not None:
        rotary["share"] = rope.partial_rotary_factor
    return {"rotary_base": int(base), "rotary": rotary}


_PLAIN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_MSCALES = ("mscale", "mscale_all_dim")


def _scaling(rope: Rope, scaling: str, longest: int) -> dict[str, object]:
    original = rope.original_max_position_embeddings or longest
    factor = rope.factor or longest / original
    if factor == 1:
        return {}
    given = {ours: getattr(rope, theirs) for ours, theirs in SCALINGS[scaling].items()}
    read = {name: value for name, value in given.items() if value is not None}
    read |= {"scaling": scaling, "factor": factor}
    if scaling == "linear":
        return read
    read["original_positions"] = original
    if scaling == "yarn" and rope.attention_factor is None and rope.mscale and rope.mscale_all_dim:
        above, below = (0.1 * scale * math.log(factor) + 1 for scale in (rope.mscale, rope.mscale_all_dim))
        read["attention_factor"] = above / below
    return read


def write_rope(config: ModelConfig) -> dict[str, object]:
    """The section of a model."""
    section: dict[str, object] = {"rope_type": "default", "rope_theta": float(config.rotary_base)}
    if config.rotary.share != 1:
        section["partial_rotary_factor"] = config.rotary.share
    if config.rotary.scaling != "none":
        section["rope_type"] = config.rotary.scaling
        for ours, theirs in SCALINGS[config.rotary.scaling].items():
            if (value := getattr(config.rotary, ours)) is not None:
                section[theirs] = value
    return section
