"""Plain PyTorch evaluation of canonical weights of an encoder-decoder.

It is the independent reference for exports, and translates on one process.
Shape letters beside those of `reference.py`: e positions of the source, k sequences of one source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.reference import Cache, Evaluation, Weights
from model.parameters.table import CONVOLUTIONS, SOURCE_EMBEDDING
from model.speech import KERNEL, STRIDE
from model.weights.bases import sinusoid_scale


@dataclass(frozen=True)
class Memory:
    """What the decoder reads of sources: computed once, for all tokens that follow."""

    keys: tuple[Tensor, ...]
    """Of every layer, [b, n, e, d]."""
    values: tuple[Tensor, ...]
    """Of the same form."""
    hidden: Tensor
    """[b, 1, 1, e], True for padding."""

    def of(self, rows: Tensor) -> Memory:
        """That of some sources."""
        keys, values = (tuple(one[rows] for one in each) for each in (self.keys, self.values))
        return Memory(keys, values, self.hidden[rows])


class Side(Evaluation):
    """One of both stacks, and its tables of words and positions."""

    def __init__(self, weights: Weights, config: ModelConfig, tables: str, **given: Any) -> None:
        """tables: the beginning of their names. given: as `Evaluation`."""
        super().__init__(weights, config, **given)
        self.tables, self.whole = tables, config
        own = tables if f"{tables}.word_embeddings.weight" in weights else "embedding"
        self.words = f"{own}.word_embeddings.weight"

    def _embed(self, tokens: Tensor, start: int, types: Tensor | None) -> Tensor:
        return self._placed(self.weights[self.words][tokens].to(self.dtype), start)

    def _placed(self, x_bsh: Tensor, start: int) -> Tensor:
        """With positions from `start` on, and the norm of the embedding."""
        stop = start + x_bsh.shape[1]
        if self.config.position == "learned":
            table = self._weight(f"{self.tables}.position_embeddings.weight")
            if stop > len(table):
                raise UserError(f"{stop} positions asked for, but the model has learned only {len(table)}")
            x_bsh = x_bsh + table[start:stop]
        if self.config.position == "sinusoidal":
            x_bsh = x_bsh + self._sinusoids(start, stop).to(x_bsh)
        return self._norm(x_bsh, f"{self.tables}.norm") if self.plan.embedding_norm else x_bsh

    def enter(self, source: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream [b, e, h], and 0 for padding [b, e], of what an encoder reads."""
        return self._embed(source, 0, None), torch.ones_like(source) if keep is None else keep

    def _sinusoids(self, start: int, stop: int) -> Tensor:
        """[stop - start, h]: sines of all frequencies, then cosines."""
        width = self.config.hidden_size
        form = self.whole.blueprint.sinusoid
        frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / form.steps(width))
        turns = form.first + torch.arange(start, stop, dtype=torch.float64)
        angles = torch.outer(turns, frequencies)
        return sinusoid_scale(self.whole) * torch.cat((angles.sin(), angles.cos()), dim=-1)


class HearingSide(Side):
    """An encoder of frames."""

    def enter(self, source: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `Side.enter`, of frames [b, f, m] with keep [b, f]."""
        keep = source.new_ones(source.shape[:2]) if keep is None else keep
        heard, x_bcf = keep[:, None] != 0, source.to(self.dtype).transpose(1, 2)
        for name in CONVOLUTIONS:
            kernel = self._weight(f"{name}.weight")
            bias = self._weight(f"{name}.bias") if self.whole.bias else None
            kernel = kernel.view(len(kernel), -1, KERNEL)
            x_bcf = F.glu(F.conv1d(x_bcf * heard, kernel, bias, stride=STRIDE, padding=KERNEL // 2), dim=1)
            heard = heard[..., ::STRIDE]
        return self._placed(x_bcf.transpose(1, 2), 0), heard[:, 0].long()


class CrossedEvaluation:
    """The model function of canonical weights of an encoder and a decoder.

    Arguments as `Evaluation`.
    """

    side: type[Side] = Side
    """Of both stacks."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        *,
        logit_scale: float,
        dtype: torch.dtype = torch.float32,
        epsilons: Mapping[str, float] | None = None,
    ) -> None:
        encoder, decoder = config.blueprint.stacks
        given = {"logit_scale": logit_scale, "dtype": dtype, "epsilons": epsilons}
        kind = self.side if config.speech is None else HearingSide
        self.encoder = kind(weights, config, SOURCE_EMBEDDING, stack=encoder, **given)
        self.decoder = self.side(weights, config, "embedding", stack=decoder, **given)

    def __call__(
        self,
        tokens: Tensor,
        *,
        source: Tensor,
        source_keep: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, s, v] of what the decoder reads, [b, s], and the encoder, [b, e].

        source_keep: as `encode`. keep: of the decoder's tokens, which do not see what follows them.
        """
        return self.decode(tokens, self.encode(source, source_keep))

    @torch.no_grad()
    def encode(self, source: Tensor, keep: Tensor | None = None) -> Memory:
        """Reads sources.

        source: [b, e] ids. keep: [b, e], 0 for padding, which nobody sees.
        Of a model of speech: frames [b, f, m], standardised, with keep [b, f]; padding is behind.
        Raises UserError when a learned position table is too short.
        """
        side = self.encoder
        x_beh, keep = side.enter(source, keep)
        x_beh = side._layers(x_beh, side._hidden(0, x_beh.shape[1], keep), None)
        keys, values = [], []
        heads, width = self.decoder.config.num_attention_heads, self.decoder.config.kv_channels
        for index in range(self.decoder.config.num_layers):
            name = f"{self.decoder.stack.layer(index)}cross_attention.linear_kv"
            kv = self.decoder._linear(x_beh, name).view(*x_beh.shape[:2], heads, 2, width)
            keys.append(kv[:, :, :, 0].transpose(1, 2).contiguous())
            values.append(kv[:, :, :, 1].transpose(1, 2).contiguous())
        return Memory(tuple(keys), tuple(values), (keep == 0)[:, None, None, :])

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, memory: Memory, cache: Cache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits [b k, s, v] of what follows tokens [b k, s].

        Padding rows of the vocabulary are left out.
        The k sequences of a source follow each other, equally many for each.
        cache: `tokens` continue the sequences in it. last_only: keeps the last position.
        Raises UserError when a learned position table is too short.
        """
        side, start = self.decoder, cache.length if cache else 0
        hidden = side._hidden(start, tokens.shape[1], None)
        cross = partial(self._cross, memory=memory)
        x_bsh = side._layers(side._embed(tokens, start, None), hidden, cache, cross)
        return side._read(x_bsh[:, -1:] if last_only else x_bsh)

    def _cross(self, u: Tensor, layer: int, memory: Memory) -> Tensor:
        """The sequences of a source are so many more queries of it."""
        config, name = self.decoder.config, f"{self.decoder.stack.layer(layer)}cross_attention"
        heads, width = config.num_attention_heads, config.kv_channels
        q = self.decoder._linear(u, f"{name}.linear_q")
        q = q.view(len(memory.hidden), -1, heads, width).transpose(1, 2)
        scores = config.score_scale * (q @ memory.keys[layer].transpose(2, 3)) / width**0.5
        probabilities = scores.masked_fill(memory.hidden, float("-inf")).softmax(-1)
        out = (probabilities @ memory.values[layer]).transpose(1, 2).reshape(*u.shape[:2], heads * width)
        return self.decoder._linear(out, f"{name}.linear_proj")
