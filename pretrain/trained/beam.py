"""Beam search: the likeliest continuations of a source, several of them at a time.

What a finished sequence y of n tokens, its end mark among them, is worth:

    score(y) = sum_i log p(y_i | y_<i, source) / n^a

a is the length penalty: 0 leaves the sum as it is, 1 makes it the mean, larger values prefer longer
sequences. This and the rules by which a search ends are those of `generate` of transformers with
`early_stopping=False`: of 2 k candidates at most the first k may finish, the first k of the others
go on, and a source is done when its best open sequence, taken as if it ended now, is not above the
k-th finished one. With one beam that is greedy search.
Shape letters: b sources, k sequences of each, t tokens so far, v vocabulary, c candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.errors import UserError

NEVER = float("-inf")


@dataclass(frozen=True)
class Search:
    """How to search."""

    beam: int = 4
    """Sequences of a source that are followed at once; 1 is greedy search."""
    length_penalty: float = 0.6
    max_new_tokens: int | None = None
    """Of a translation, its end mark among them; None: as many as the model was trained on."""
    best: int = 1
    """Sequences of a source to give back."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        for wrong, message in (
            (self.beam < 1, f"--beam {self.beam} must be at least 1, which is greedy search"),
            (
                not math.isfinite(self.length_penalty),
                f"--length-penalty {self.length_penalty} must be a finite number",
            ),
            (
                self.max_new_tokens is not None and self.max_new_tokens < 1,
                f"--max-new-tokens {self.max_new_tokens} must be at least 1",
            ),
            (
                not 1 <= self.best <= self.beam,
                f"--best {self.best} must lie between 1 and --beam {self.beam}: search with a larger beam",
            ),
        ):
            if wrong:
                raise UserError(message)


@dataclass(frozen=True)
class Found:
    """A finished sequence."""

    ids: list[int]
    """With the end mark, where it was reached within the most tokens that were allowed."""
    score: float


class Decoding(Protocol):
    """A model that has read b sources."""

    def next(self, tokens: Tensor, rows: Tensor | None, sources: Tensor | None) -> Tensor:
        """Logits [b k, v] of what follows the sequences of all sources.

        tokens: [b k], the last one of each.
        rows: [b k], which sequences of the call before they continue; None at the first.
        sources: [b], which sources of the call before are left; None for all.
        """


@torch.no_grad()
def search(decoding: Decoding, sources: int, settings: Search, end: int) -> list[list[Found]]:
    """The best sequences of every source, best first.

    sources: how many the model has read. settings: with a number of tokens.
    end: the end mark, which also begins all sequences.
    Raises UserError where logits are not finite.
    """
    longest = settings.max_new_tokens
    assert longest is not None
    found: list[list[Found]] = [[] for _ in range(sources)]
    left = list(range(sources))
    tokens_bkt = torch.empty(sources, 1, 0, dtype=torch.int64)
    sums_bk, last, rows, kept = torch.zeros(sources, 1), torch.full((sources,), end), None, None
    for length in range(1, longest + 1):
        logits = decoding.next(last, rows, kept).cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: this checkpoint translates nothing")
        b, k, v = len(left), sums_bk.shape[1], logits.shape[-1]
        sums_bkv = sums_bk[..., None] + logits.log_softmax(-1).view(b, k, v)
        sums_bc, places_bc = sums_bkv.flatten(1).topk(min(2 * settings.beam, k * v))
        origins_bc, ids_bc = places_bc // v, places_bc % v
        tokens_bct = torch.cat((_pick(tokens_bkt, origins_bc), ids_bc[..., None]), dim=-1)
        ended_bc = (ids_bc == end) | (length == longest)
        _collect(found, left, tokens_bct, sums_bc / length**settings.length_penalty, ended_bc, settings.beam)

        open_bk, chosen_bk = sums_bc.masked_fill(ended_bc, NEVER).topk(min(settings.beam, sums_bc.shape[1]))
        hopes = (open_bk[:, 0] / length**settings.length_penalty).tolist()
        kept = torch.tensor(
            [at for at, hope in enumerate(hopes) if hope > _worst(found[left[at]], settings.beam)],
            dtype=torch.int64,
        )
        if not len(kept):
            break
        left = [left[at] for at in kept.tolist()]
        chosen_bk = chosen_bk[kept]
        sums_bk, tokens_bkt = open_bk[kept], _pick(tokens_bct[kept], chosen_bk)
        rows = (kept[:, None] * k + origins_bc[kept].gather(1, chosen_bk)).flatten()
        last = tokens_bkt[..., -1].flatten()
    return [sequences[: settings.best] for sequences in found]


def _pick(tokens: Tensor, chosen: Tensor) -> Tensor:
    """[b, c, t]: the sequences of [b, k, t] with the numbers [b, c]."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))


def _worst(sequences: list[Found], beam: int) -> float:
    """What a sequence must beat to be among the best."""
    return sequences[-1].score if len(sequences) == beam else NEVER


def _collect(
    found: list[list[Found]],
    left: list[int],
    tokens_bct: Tensor,
    scores_bc: Tensor,
    ended_bc: Tensor,
    beam: int,
) -> None:
    """Adds what has ended among the first candidates, and keeps the best of each source."""
    ended = ended_bc[:, :beam] & (scores_bc[:, :beam] > NEVER)
    for at, place in ended.nonzero().tolist():
        sequences = found[left[at]]
        sequences.append(Found(tokens_bct[at, place].tolist(), float(scores_bc[at, place])))
        sequences.sort(key=lambda one: -one.score)
        del sequences[beam:]
