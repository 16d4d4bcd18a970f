"""How large a model is, from its configuration alone: parameters by part."""

from __future__ import annotations

from model.config import ModelConfig
from model.parameters.table import CONVOLUTIONS, Role, Row, parameter_table

ENDS = {
    Role.WORD: "word_embeddings",
    Role.POSITION: "position_embeddings",
    Role.TOKEN_TYPE: "token_type_embeddings",
    Role.PATCH: "patches",
    Role.CLASS_TOKEN: "patches",
    Role.FRAMES: "convolutions",
    Role.OUTPUT: "output_layer",
    Role.LOGIT_BIAS: "output_layer",
    Role.NORM_GAIN: "norms",
    Role.NORM_BIAS: "norms",
    Role.GATE: "gates",
}
"""Where a parameter is counted that does not count as its sublayer's."""
COUNTED = ("word_embeddings", "position_embeddings", "attention", "mlp", "norms", "gates", "output_layer")


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Parameters by part, those that the model lacks as 0, then `total`.

    Tables of token types, maps of patches, convolutions over frames and heads with parameters are
    named where there are some.

    Tied embeddings count once, and the padding rows of the vocabulary count.
    Raises UserError where `parameter_table` does.
    """
    counts = dict.fromkeys(COUNTED, 0)
    for row in parameter_table(config):
        counts[_part(row)] = counts.get(_part(row), 0) + row.elements
    return {**counts, "total": sum(counts.values())}


def _part(row: Row) -> str:
    if row.stack == "head":
        return "head"
    if row.stack == "embedding" and row.role is Role.LINEAR_BIAS:
        return "convolutions" if row.module in CONVOLUTIONS else "patches"
    return ENDS.get(row.role) or ("mlp" if row.sublayer == "mlp" else "attention")
