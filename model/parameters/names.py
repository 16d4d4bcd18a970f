"""Canonical, topology-free parameter names, and how a local tensor is cut from the whole one.

A canonical name has the global 0-based layer number and no trace of pipeline stage, model chunk or layer specification.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from model.parameters.shards import Shard

# Transformer Engine fuses a norm into the linear layer after it; the canonical name is the norm's own.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "mlp.fc1_layer_norm_": "pre_mlp_layernorm.",
}
LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
WORD_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class NamedParameter:
    """A local parameter, its canonical name, and its place in the whole tensor.

    copy: a tied embedding's second copy on the last pipeline stage.
    """

    name: str
    parameter: nn.Parameter
    shard: Shard
    copy: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the local tensor, also where ZeRO-3 has cut it over data-parallel ranks and the parameter itself is empty."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))


def canonical_name(local: str, layer_offset: int) -> str:
    """Canonical name of a parameter of one model chunk. layer_offset: global number of the chunk's first layer, 0-based."""
    match = LAYER.match(local)
    if match is None:
        return local
    number, rest = int(match[1]) + layer_offset, match[2]
    for fused, own in FUSED_NORMS.items():
        if rest.startswith(fused):
            rest = own + rest.removeprefix(fused)
    return f"decoder.layers.{number}.{rest}"


def layer_offset(chunk: nn.Module) -> int:
    """Global number of a model chunk's first layer, 0-based."""
    layers = chunk.decoder.layers  # type: ignore[union-attr]
    return int(layers[0].layer_number) - 1 if len(layers) else 0  # type: ignore[index, arg-type, operator, union-attr]


def named_parameters(chunk: nn.Module, tensor_rank: int, tensor_size: int) -> Iterator[NamedParameter]:
    """Parameters of one model chunk (a `GPT`), in module order."""
    offset = layer_offset(chunk)
    for local, parameter in chunk.named_parameters():
        copy = local == "output_layer.weight" and bool(chunk.share_embeddings_and_output_weights)
        yield NamedParameter(
            WORD_EMBEDDING if copy else canonical_name(local, offset),
            parameter,
            _shard(local, parameter, chunk, tensor_rank, tensor_size),
            copy,
        )


def _shard(local: str, parameter: nn.Parameter, chunk: nn.Module, rank: int, size: int) -> Shard:
    if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
        return Shard(None, 0, 1)
    # A gated fc1 holds [gate; up] of its own columns on each rank: two strides in the whole tensor.
    gated = bool(chunk.config.gated_linear_unit) and ".linear_fc1." in local  # type: ignore[union-attr]
    return Shard(int(getattr(parameter, "partition_dim", 0)), rank, size, 2 if gated else 1)
