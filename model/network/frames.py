"""What an encoder of speech has where others have tables of words: convolutions over frames."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.network.embedding import Sinusoids, as_stream
from model.speech import FRAMES_PER_TOKEN, KERNEL, STRIDE, SpeechConfig
from model.weights.bases import sinusoid_scale


def with_source(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A batch whose tokens of frames have the number of their clip, [b, s] for frames [b, 4 s].

    Of words as it is.
    """
    if "frames" not in batch:
        return batch
    source = batch["frame_documents"][:, ::FRAMES_PER_TOKEN]
    return {**batch, "source": source, "source_documents": source}


class GatedConvolution(nn.Linear):
    """A convolution that halves the number of places, and a gate that halves its channels.

    Its weight is a matrix from a window's numbers, [out, in x kernel], as a convolution's lies.
    """

    def forward(self, x_bcf: Tensor) -> Tensor:
        """[b, out / 2, f / 2] of [b, in, f]."""
        kernel = self.weight.view(self.out_features, -1, KERNEL)
        return F.glu(F.conv1d(x_bcf, kernel, self.bias, stride=STRIDE, padding=KERNEL // 2), dim=1)


class FrameTables(nn.Module):
    """Two convolutions with gates, each of which halves the number of places, and positions.

    A clip does not feel what stands beside it in its row: outside of it every convolution reads
    zeros, as at the ends of a tensor. Every tensor-parallel rank computes the same, so that
    gradients need no sum over ranks.
    """

    norm: nn.Module
    """The scheme's norm of the embedding, where it has one."""

    def __init__(
        self,
        model: ModelConfig,
        speech: SpeechConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        positions: int,
    ) -> None:
        """positions: tokens of the longest row."""
        super().__init__()
        self.config, self.group = config, groups.tp
        width, dtype = config.hidden_size, config.params_dtype
        entering, inner = (KERNEL * numbers for numbers in speech.widths)
        self.first = GatedConvolution(entering, speech.channels, bias=model.bias, dtype=dtype)
        self.second = GatedConvolution(inner, 2 * width, bias=model.bias, dtype=dtype)
        self.position_embeddings: nn.Module | None = None
        if model.position == "learned":
            self.position_embeddings = nn.Embedding(positions, width, dtype=dtype)
        if model.position == "sinusoidal":
            scale, form = sinusoid_scale(model), model.blueprint.sinusoid
            self.position_embeddings = Sinusoids(positions, width, scale, dtype, form)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, frames_bfm: Tensor, documents_bf: Tensor, positions_bs: Tensor | None = None) -> Tensor:
        """The stream [s, b, h], or [s / TP, b, h] under sequence parallelism, of 4 s frames.

        documents_bf: numbers of clips, each of which begins at a multiple of 4 frames and has at
        least `GAP` tokens' frames of number 0 behind it; 0 for what is no clip.
        positions_bs: in the clip; without them 0 .. s - 1.
        """
        x_bcf = frames_bfm.to(self.first.weight.dtype).transpose(1, 2)
        heard_bf = documents_bf > 0
        for convolution in (self.first, self.second):
            x_bcf = convolution(x_bcf * heard_bf[:, None])
            heard_bf = heard_bf[:, ::STRIDE]
        x_bsh = x_bcf.transpose(1, 2)
        if self.position_embeddings is not None:
            if positions_bs is None:
                places = torch.arange(x_bsh.shape[1], device=x_bsh.device)
                positions_bs = places.expand(len(x_bsh), -1)
            x_bsh = x_bsh + self.position_embeddings(positions_bs)
        return as_stream(x_bsh, self.dropout, self.config, self.group)
