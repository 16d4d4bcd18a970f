"""Angles of rotary positions, of sequences that may be cut over ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.config import ModelConfig
from model.layers.context import own_pieces
from model.layers.torch_parts import rotary_table
from model.network.documents import turned_by_position
from model.rotary import frequencies, magnitude, scales


class RotaryAngles(nn.Module):
    """Tables of cosines and sines, once a micro-batch for all layers. It has no parameters.

    group: of ranks over which sequences are cut.
    restarts: whether positions that a batch brings along count, which start again with every
        document.
    """

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, group: ProcessGroup, *, restarts: bool
    ) -> None:
        super().__init__()
        self.group, self.restarts, self.dtype = group, restarts, config.params_dtype
        kinds = (False,) if model.rotary_base_local is None else (False, True)
        self.bases = nn.ModuleList(_embedding(model, config, group, local=local) for local in kinds)
        """Of all layers, and of those with a window where they have a base of their own."""
        self.magnitudes = [magnitude(model, local=local) for local in kinds]

    def of_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As `of_length`, of a batch; where positions restart, a table for every sample."""
        length, positions = batch["tokens"].shape[1], batch.get("positions") if self.restarts else None
        if positions is None:
            return self.of_length(length)
        return turned_by_position(self.of_length(length, whole=True), positions)

    def of_length(self, length: int, *, whole: bool = False) -> Tensor:
        """A `rotary_table`, beside it that of layers with a window where they have their own.

        length: tokens of this rank. whole: of all positions of a sequence, not of its own alone.
        """
        rank, ranks = self.group.rank(), self.group.size()
        tables = [
            # What Megatron-core calls packed it does not cut itself, for which it needs a GPU.
            rotary_table(
                own_pieces(base(length * ranks, packed_seq=True), 0, rank, 1 if whole else ranks),
                self.dtype,
                factor,
            )
            for base, factor in zip(self.bases, self.magnitudes, strict=True)
        ]
        return torch.cat(tables, dim=2) if len(tables) > 1 else tables[0]


def _embedding(
    model: ModelConfig, config: TransformerConfig, group: ProcessGroup, *, local: bool
) -> RotaryEmbedding:
    part = RotaryEmbedding(
        kv_channels=model.rotary_width,
        rotary_percent=1.0,
        rotary_interleaved=config.rotary_interleaved,
        rotary_base=(local and model.rotary_base_local) or model.rotary_base,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=group,
    )
    if scales(model, local=local):
        part.inv_freq = frequencies(model, local=local).to(part.inv_freq.device)
    return part
