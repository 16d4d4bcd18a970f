"""What enters the first layer: tables of words and positions, and how two stacks share them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.families.family import PLAIN, Sinusoid
from model.weights.bases import sinusoid_scale

CORE_POSITIONS = {"learned": "learned_absolute", "sinusoidal": "learned_absolute", "rotary": "rope"}


def as_stream(
    x_bsh: Tensor, dropout: nn.Module, config: TransformerConfig, group: dist.ProcessGroup
) -> Tensor:
    """What enters the first layer, as Megatron-core's embedding hands it on.

    [s, b, h], or [s / TP, b, h] under sequence parallelism, where each rank drops for itself.
    group: of the tensor-parallel ranks.
    """
    x_sbh = x_bsh.transpose(0, 1).contiguous()
    if config.fp32_residual_connection:
        x_sbh = x_sbh.float()
    if not config.sequence_parallel:
        return dropout(x_sbh)  # type: ignore[no-any-return]
    x_sbh = scatter_to_sequence_parallel_region(x_sbh, group=group)
    with get_cuda_rng_tracker().fork():
        return dropout(x_sbh)  # type: ignore[no-any-return]


class Sinusoids(nn.Module):
    """Fixed positions: sines of all frequencies, then cosines, in the order of Marian.

    It stands where Megatron-core's embedding has its table of positions.
    """

    def __init__(
        self, rows: int, width: int, scale: float, dtype: torch.dtype, form: Sinusoid = PLAIN
    ) -> None:
        """rows: positions of the longest sequence. scale: factor on all entries."""
        super().__init__()
        self.rows, self.width, self.scale, self.dtype, self.form = rows, width, scale, dtype, form
        self.table: Tensor | None = None
        """[rows, h], made at first use. It is no buffer: nothing is learned or saved."""

    def forward(self, positions: Tensor) -> Tensor:
        """positions: [b, s] -> [b, s, h]."""
        if self.table is None or self.table.device != positions.device:
            half = torch.arange(self.width // 2, dtype=torch.float64, device=positions.device)
            turns = self.form.first + torch.arange(self.rows, dtype=torch.float64, device=positions.device)
            angles = turns[:, None] * 10000.0 ** (-half / self.form.steps(self.width))
            self.table = (self.scale * torch.cat((angles.sin(), angles.cos()), dim=-1)).to(self.dtype)
        return self.table[positions]


def input_tables(
    model: ModelConfig,
    config: TransformerConfig,
    positions: int,
    groups: ProcessGroupCollection,
    words: nn.Module | None = None,
) -> LanguageModelEmbedding:
    """The tables that make one stack's stream of its tokens.

    positions: of the longest sequence.
    words: the table of words of another stack that this one shares; None for its own.
    """
    embedding = LanguageModelEmbedding(
        config=config,
        vocab_size=model.padded_vocab,
        max_sequence_length=1 if model.position == "sinusoidal" else positions,
        position_embedding_type=CORE_POSITIONS.get(model.position, "none"),
        num_tokentypes=model.token_types,
        tp_group=groups.tp,
    )
    if model.position == "sinusoidal":
        embedding.position_embeddings = Sinusoids(
            positions,
            config.hidden_size,
            sinusoid_scale(model),
            config.params_dtype,
            model.blueprint.sinusoid,
        )
    if words is not None:
        embedding.word_embeddings = words
    return embedding
