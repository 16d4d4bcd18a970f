"""Where the texts of rows stand. Padding is none, and would pass for one that all rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.network.frames import with_source
from pretrain.tasks.task import Batch


class Split(NamedTuple):
    """Tokens text by text."""

    values: Tensor
    """[n, ...], row after row."""
    text: Tensor
    """Number of each one's text, [n], from 0 on."""
    counts: Tensor
    """Tokens of each text."""

    @property
    def pairs(self) -> int:
        """Of two different tokens of one text, in order."""
        return int((self.counts * (self.counts - 1)).sum())


@dataclass(frozen=True)
class Places:
    """Those of one stack. Tokens of different texts do not see each other."""

    texts_bs: Tensor | None = None
    """Numbers of texts, increasing along a row, 0 for padding; None: every row is one."""
    halved: bool = True
    """Whether the second half of a text is worth a look of its own."""

    @property
    def texts_in_a_row(self) -> float:
        """Their mean number."""
        return 1.0 if self.texts_bs is None else len(self.split(self.texts_bs).counts) / len(self.texts_bs)

    @property
    def mean_length(self) -> float | None:
        """Tokens of a text; None where every row is one."""
        return None if self.texts_bs is None else float(self.split(self.texts_bs).counts.double().mean())

    def split(self, x_bs: Tensor) -> Split:
        """Tokens, or what belongs to each of them, [b, s, ...]."""
        texts = torch.ones(x_bs.shape[:2], dtype=torch.int64) if self.texts_bs is None else self.texts_bs
        return _split(x_bs, texts.to(x_bs.device))

    def of(self, x_sbh: Tensor) -> Tensor:
        """The vectors of all tokens, [n, h]."""
        return self.split(x_sbh.transpose(0, 1)).values

    def late(self, x_sbh: Tensor) -> Tensor:
        """The vectors of the second half of each text."""
        values, text, counts = self.split(x_sbh.transpose(0, 1))
        place = torch.arange(len(values), device=values.device) - (counts.cumsum(0) - counts)[text]
        return values[place >= counts[text] // 2] if self.halved else values

    def correlation(self, x_sbh: Tensor) -> float:
        """Mean product of different tokens' vectors over the mean square of one's, within texts.

        Entries are taken from their mean, as variance has them: fixed positions have one.
        0 for a stream of equal entries, and where no text has two tokens.
        """
        found = self.split(x_sbh.detach().double().transpose(0, 1))
        values = found.values - found.values.mean()
        own = float(values.square().sum())
        sums = values.new_zeros(len(found.counts), values.shape[-1])
        products = float(sums.index_add_(0, found.text, values).square().sum()) - own
        return products / found.pairs * len(values) / own if own and found.pairs else 0.0

    def coincidence(self, tokens_bs: Tensor) -> float:
        """Chance that two different places of a text hold the same token.

        It is the word table's token correlation on these tokens.
        """
        found = self.split(tokens_bs)
        _, equal = torch.stack((found.text, found.values)).unique(dim=1, return_counts=True)
        return int((equal * (equal - 1)).sum()) / found.pairs if found.pairs else 0.0


def _split(x_bs: Tensor, texts_bs: Tensor) -> Split:
    rows = torch.arange(len(texts_bs), device=texts_bs.device)[:, None]
    numbers = rows * (int(texts_bs.max()) + 1) + texts_bs
    filled = texts_bs > 0
    _, text, counts = torch.unique_consecutive(numbers[filled], return_inverse=True, return_counts=True)
    return Split(x_bs[filled], text, counts)


def places_of(model: ModelConfig, batch: Batch) -> list[Places]:
    """Of every stack, first to last."""
    if model.image is not None:
        # The head reads the first position, or all alike.
        return [Places(halved=False)]
    numbers = with_source(batch)
    if model.blueprint.crossed:
        return [Places(numbers.get(key)) for key in ("source_documents", "documents")]
    texts = numbers.get("documents")
    # Rows of a decoder have no padding: its first text has the number 0.
    return [Places(texts + 1 if texts is not None and model.blueprint.stacks[0].causal else texts)]
