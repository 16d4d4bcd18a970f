"""The parameters of one model chunk under their canonical names.

A canonical name has the 0-based number of the layer in its stack and no trace of pipeline stage,
model chunk or layer specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from model.depth.placed import PlacedLayer
from model.parameters.shards import Shard
from model.parameters.table import WORD_EMBEDDING, Row

# Transformer Engine fuses a norm into the linear layer after it; the name is the norm's own.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "mlp.fc1_layer_norm_": "pre_mlp_layernorm.",
}
# Megatron-core looks for the block of every model under this name.
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
FINAL_NORM = "decoder.final_layernorm"
LAYER_NUMBER = re.compile(r"^(decoder|encoder)\.layers\.(\d+)\.")
"""The stack and the number of a layer in canonical names."""


@dataclass(frozen=True)
class NamedParameter:
    """A local parameter, what it is in the whole model, and its place in the whole tensor."""

    row: Row
    parameter: nn.Parameter
    shard: Shard
    copy: bool = False
    """A tied embedding's second copy, on the last pipeline stage."""

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.row.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the local tensor.

        ZeRO-3 cuts that over data-parallel ranks once more, and leaves the parameter itself empty.
        """
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))


def canonical_name(local: str, layer_offset: int, placed: Sequence[PlacedLayer]) -> str:
    """Canonical name of a parameter of one model chunk.

    layer_offset: number of the chunk's first layer in the whole model, 0-based.
    placed: all layers of the model.
    """
    match = LAYER.match(local)
    if match is None:
        final = placed[-1].stack.final_norm
        return final + local.removeprefix(FINAL_NORM) if local.startswith(FINAL_NORM) else local
    number, rest = int(match[1]) + layer_offset, match[2]
    for fused, own in FUSED_NORMS.items():
        if rest.startswith(fused):
            rest = own + rest.removeprefix(fused)
    return placed[number].prefix + rest


def layer_offset(chunk: nn.Module) -> int:
    """Number of a model chunk's first layer in the whole model, 0-based."""
    first = next(chunk.get_submodule("decoder.layers").children(), None)
    return 0 if first is None else int(first.layer_number) - 1  # type: ignore[arg-type]


def named_parameters(chunk: nn.Module, tensor_rank: int, tensor_size: int) -> Iterator[NamedParameter]:
    """Parameters of one model chunk (a `LanguageModel`), in module order.

    Raises KeyError for a parameter that is not in the table of the model.
    """
    offset = layer_offset(chunk)
    rows: dict[str, Row] = chunk.rows  # type: ignore[assignment]
    placed: tuple[PlacedLayer, ...] = chunk.placed  # type: ignore[assignment]
    for local, parameter in chunk.named_parameters():
        copy = local == "output_layer.weight" and bool(chunk.share_embeddings_and_output_weights)
        row = rows[WORD_EMBEDDING if copy else canonical_name(local, offset, placed)]
        yield NamedParameter(row, parameter, row.shard(tensor_rank, tensor_size), copy)
