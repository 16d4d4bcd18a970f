"""Samples that are one document each, or a part of one.

Pure functions of position, as those of `order.py` are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.config.sections.masking import LongDocuments
from pretrain.data.order import permutation


@dataclass(frozen=True)
class SingleOrder:
    """One pass over the documents of a corpus."""

    firsts: np.ndarray
    """[D + 1] samples before each document, in the order of the files."""
    samples: np.ndarray
    """[N] in order of training."""
    lengths: np.ndarray
    """[D] tokens of each document."""
    single: Single

    def spans(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of sample number `sample` of this pass, seq_length tokens at most.

        A part is (document, first token, number of tokens). Of a document that is cut the last part
        is the mark at its end.
        """
        number = int(self.samples[sample])
        document = int(np.searchsorted(self.firsts, number, side="right")) - 1
        length, first = int(self.lengths[document]), int(self.firsts[document])
        if self.single.long == "cut" and length > self.single.seq_length:
            yield document, 0, self.single.seq_length - 1
            yield document, length - 1, 1
            return
        pieces, piece = int(self.firsts[document + 1]) - first, number - first
        start, stop = length * piece // pieces, length * (piece + 1) // pieces
        yield document, start, stop - start


@dataclass(frozen=True)
class Single:
    """A sample is a document; one of more than seq_length tokens is split or cut."""

    seq_length: int
    long: LongDocuments

    @property
    def name(self) -> str:
        return f"{self.long}{self.seq_length}"

    @property
    def needs(self) -> str:
        return "a document"

    def samples(self, tokens: int, lengths: np.ndarray) -> int:
        return int(self._pieces(lengths).sum())

    def build(self, lengths: np.ndarray, key: int) -> np.ndarray:
        """Orders one pass: [D + 1 + N], samples before each document and the order of samples."""
        firsts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(self._pieces(lengths), out=firsts[1:])
        return np.concatenate([firsts, permutation(np.random.Philox(key=key), int(firsts[-1]))])

    def stored(self, documents: int, samples: int) -> int:
        return documents + 1 + samples

    def order(self, index: np.ndarray, lengths: np.ndarray) -> SingleOrder:
        return SingleOrder(index[: len(lengths) + 1], index[len(lengths) + 1 :], lengths, self)

    def _pieces(self, lengths: np.ndarray) -> np.ndarray:
        """[D] samples that each document gives, parts of which differ by one token at most."""
        if self.long == "cut":
            return np.ones(len(lengths), dtype=np.int64)
        return -(-lengths.astype(np.int64) // self.seq_length)
