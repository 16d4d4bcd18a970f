"""What a model of images has where others have tables of words, and what its head reads."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.images import ImageConfig
from model.network.embedding import Sinusoids, as_stream
from model.network.head import TargetHead
from model.weights.bases import sinusoid_scale


def cut_patches(images_bchw: Tensor, image: ImageConfig) -> Tensor:
    """[b, patches, channels x p x p], row by row of the grid, each patch channel by channel.

    Raises ValueError for images of another size.
    """
    if tuple(images_bchw.shape[1:]) != image.shape:
        raise ValueError(f"images of shape {tuple(images_bchw.shape[1:])} for a model of {image.shape}")
    (rows, columns), p = image.grid, image.patch
    cut = images_bchw.reshape(-1, image.channels, rows, p, columns, p)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(len(images_bchw), image.patches, image.patch_numbers)


class GridPositions(nn.Module):
    """Fixed positions of patches: half of a vector tells the row, the other half the column."""

    def __init__(self, image: ImageConfig, width: int, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = image.grid
        self.sinusoids = Sinusoids(max(image.grid), width // 2, scale, dtype)

    def forward(self, device: torch.device) -> Tensor:
        """[1, patches, h]."""
        rows, columns = (self.sinusoids(torch.arange(size, device=device)) for size in self.grid)
        shape = (*self.grid, rows.shape[-1])
        both = rows[:, None].expand(shape), columns[None].expand(shape)
        return torch.cat(both, dim=-1).flatten(0, 1)[None]


class PatchTables(nn.Module):
    """A linear map of patches, a class token and positions; the stream of their sum.

    Every tensor-parallel rank computes the same, so that gradients need no sum over ranks.
    """

    def __init__(
        self,
        model: ModelConfig,
        image: ImageConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.image, self.config, self.group = image, config, groups.tp
        width, dtype = config.hidden_size, config.params_dtype
        self.patches = nn.Linear(image.patch_numbers, width, bias=model.bias, dtype=dtype)
        if image.class_token:
            self.class_token = nn.Embedding(1, width, dtype=dtype)
        if model.position == "learned":
            self.position_embeddings = nn.Embedding(image.tokens, width, dtype=dtype)
        self.learned = model.position == "learned"
        fixed = model.position == "sinusoidal"
        self.fixed = GridPositions(image, width, sinusoid_scale(model), dtype) if fixed else None
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, images_bchw: Tensor) -> Tensor:
        """The stream [s, b, h], or [s / TP, b, h] under sequence parallelism."""
        x_bsh = self.patches(cut_patches(images_bchw, self.image).to(self.patches.weight.dtype))
        if self.fixed is not None:
            x_bsh = x_bsh + self.fixed(x_bsh.device)
        if self.image.class_token:
            x_bsh = torch.cat((self.class_token.weight.expand(len(x_bsh), 1, -1), x_bsh), dim=1)
        if self.learned:
            x_bsh = x_bsh + self.position_embeddings.weight
        return as_stream(x_bsh, self.dropout, self.config, self.group)


class PooledHead(TargetHead):
    """One vector of every image, for the output projection to read."""

    def __init__(self, image: ImageConfig, config: TransformerConfig) -> None:
        super().__init__(config)
        self.image = image

    def forward(self, stream_sbh: Tensor, targets_bt: Tensor | None) -> Tensor:
        """[1, b, h]. stream_sbh: as `TargetHead.forward`. targets_bt: None."""
        whole_sbh = super().forward(stream_sbh, targets_bt)
        return whole_sbh[:1] if self.image.class_token else whole_sbh.mean(0, keepdim=True)
