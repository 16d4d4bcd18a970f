"""What an encoder and a decoder see of each other's and their own positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from model.depth.placed import PlacedLayer
from model.layers.seam import DecoderLayer, EncoderLayer
from model.network.documents import hidden_keys


def seam_spec(
    spec: ModuleSpec, place: PlacedLayer, own_config: TransformerConfig, *, joins: bool
) -> ModuleSpec:
    """The specification of a layer as one of the two stacks. Arguments as `SeamLayer`."""
    kind = DecoderLayer if place.stack.cross else EncoderLayer
    params: dict[str, Any] = {**spec.params, "own_config": own_config, "joins": joins}
    return ModuleSpec(module=kind, params=params, submodules=spec.submodules)


def crossed_masks(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """True hides: [b, 1, s_d, s_d] in the decoder, [b, 1, s_e + s_d, s_e] in front of the encoder.

    A token sees its own pair only, and in the decoder nothing after it. Padding, number 0, sees
    all of the encoder, so that no row is without a key.
    batch: source [b, s_e], tokens [b, s_d], and source_documents, documents of the same shapes:
    numbers of pairs; without them all tokens of a row are one pair.
    """
    source, target = batch.get("source_documents"), batch.get("documents")
    if source is None:
        source = torch.ones_like(batch["source"])
    if target is None:
        target = torch.ones_like(batch["tokens"])
    in_encoder = source[:, :, None] != source[:, None, :]
    crossed = (target[:, :, None] != source[:, None, :]) & (target != 0)[:, :, None]
    own = hidden_keys(target, torch.arange(target.shape[1], device=target.device), causal=True)
    return own, torch.cat((in_encoder, crossed), dim=1)[:, None]
