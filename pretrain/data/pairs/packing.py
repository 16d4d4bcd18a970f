"""Which pairs share a row of a source and a target side.

Pure functions of the pairs' lengths. A row keeps its pairs in every pass, so that all passes have
equally many rows; the order of rows is new in each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pretrain.data.order import permutation

OPEN = 128
"""Rows that are filled at a time."""
PACKING_VERSION = 1
"""Part of the cache file's name: raise it with every change of what `pack` returns."""
_KEY = 0x7061636B
"""Of the order in which pairs are packed, which no run decides."""


def pack(lengths: np.ndarray, source_length: int, seq_length: int) -> np.ndarray:
    """Returns the row of each pair, int64 [P]; -1 for a pair that is longer than a row.

    lengths: [P, 2] tokens of each source and target.
    A pair goes to that open row in which it leaves least room, by the share of the scarcer side.
    """
    room = np.array([source_length, seq_length], dtype=np.int64)
    rows = np.full(len(lengths), -1, dtype=np.int64)
    left = np.zeros((OPEN, 2), dtype=np.int64)  # of each open row
    numbers = np.full(OPEN, -1, dtype=np.int64)
    begun = 0
    for pair in permutation(np.random.Philox(key=_KEY), len(lengths)):
        own = lengths[pair]
        if (own > room).any():
            continue
        after = left - own
        fits = (after >= 0).all(axis=1)
        if fits.any():
            place = int(np.argmin(np.where(fits, (after / room).sum(axis=1), np.inf)))
        else:  # the fullest row is closed
            place = int(np.argmin((left / room).sum(axis=1)))
            left[place], numbers[place] = room, begun
            begun += 1
        left[place] -= own
        rows[pair] = numbers[place]
    return rows


@dataclass(frozen=True)
class Packing:
    """The rows of a split."""

    pairs: np.ndarray
    """[P'] pairs that fit, row by row."""
    starts: np.ndarray
    """[R + 1] pairs before each row."""
    targets: np.ndarray
    """[R] tokens of the target side of each row."""
    sources: np.ndarray
    """[R] the same of the source side."""
    left_out: int
    """Pairs that are longer than a row."""

    @classmethod
    def of(cls, rows: np.ndarray, lengths: np.ndarray) -> Packing:
        """From what `pack` returns, and lengths [P, 2]."""
        kept = np.flatnonzero(rows >= 0)
        pairs = kept[np.argsort(rows[kept], kind="stable")]
        count = int(rows.max()) + 1 if len(kept) else 0
        starts = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows[kept], minlength=count), out=starts[1:])
        sources, targets = (
            np.bincount(rows[kept], weights=lengths[kept, side], minlength=count).astype(np.int64)
            for side in (0, 1)
        )
        return cls(pairs, starts, targets, sources, len(rows) - len(kept))

    @property
    def rows(self) -> int:
        """R."""
        return len(self.starts) - 1

    def padding(self, source_length: int, seq_length: int) -> tuple[float, float]:
        """Share of padding on the source and on the target side."""
        used = self.sources.sum() / (self.rows * source_length), self.targets.sum() / (self.rows * seq_length)
        return float(1 - used[0]), float(1 - used[1])
