"""Which tokens training sample number i consists of.

Pure functions of position, free of any state, step count or process layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from model.errors import UserError

BLEND_BLOCK = 1 << 20
"""Samples after which the blend's pattern repeats: shares are exact to one in a million."""
INDEX_VERSION = 2
"""Part of the cache file's name: raise it with every change of what a cache file holds."""


class Order(Protocol):
    """One pass over a corpus."""

    def spans(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of sample number `sample` of this pass, in order.

        A part is (document, first token, number of tokens).
        """


class Cut(Protocol):
    """How samples are cut from the documents of a corpus."""

    @property
    def seq_length(self) -> int:
        """Tokens of a sample."""

    @property
    def name(self) -> str:
        """Part of the names of cache files."""

    @property
    def needs(self) -> str:
        """What one sample takes, in words."""

    def samples(self, tokens: int, lengths: np.ndarray) -> int:
        """How many there are of all `tokens`, in documents of `lengths` [D]."""

    def build(self, lengths: np.ndarray, key: int) -> np.ndarray:
        """Orders one pass; key: of `epoch_key`."""

    def stored(self, documents: int, samples: int) -> int:
        """How many numbers `build` returns."""

    def order(self, index: np.ndarray, lengths: np.ndarray) -> Order:
        """Takes an array of `build` apart."""


def samples_per_epoch(tokens: int, seq_length: int) -> int:
    """Returns how many samples of seq_length + 1 tokens a stream of `tokens` tokens holds.

    Each overlaps the next by one token.
    """
    return max((tokens - 1) // seq_length, 0)


def epoch_key(seed: int, identity: str, epoch: int) -> int:
    """Returns the 128-bit Philox key of one pass over one corpus."""
    return _key(f"{seed}/{identity}/{epoch}")


def sample_key(what: str, seed: int | None, index: int) -> int:
    """Returns the 128-bit Philox key of what is drawn for one sample.

    seed: of the run; None for evaluations, which draw the same in all runs.
    index: of the sample, over all passes.
    """
    return _key(f"{what}/{index}" if seed is None else f"{what}/{seed}/{index}")


def _key(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")


def permutation(generator: np.random.Philox, count: int) -> np.ndarray:
    """Returns a permutation of `count` numbers, int64, that only the generator's state decides."""
    # Raw output of the bit generator: numpy promises never to change it, unlike permutation's.
    return np.argsort(generator.random_raw(count), kind="stable").astype(np.int64, copy=False)


def build_epoch(lengths: np.ndarray, seq_length: int, key: int) -> np.ndarray:
    """Orders one pass over a corpus.

    lengths: [D] tokens of each document, end mark included.
    Documents are shuffled and concatenated, the stream is cut into samples, and the samples are
    shuffled, so that the parts of a long document do not meet in one batch.
    Returns one int64 array [2 D + 1 + N], which `Stream.order` takes apart: document order [D],
    first token of each [D + 1], sample order [N].
    """
    generator = np.random.Philox(key=key)
    documents = permutation(generator, len(lengths))
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths[documents], out=starts[1:])
    samples = permutation(generator, samples_per_epoch(int(starts[-1]), seq_length))
    return np.concatenate([documents, starts, samples])


@dataclass(frozen=True)
class EpochOrder:
    """What `build_epoch` computed."""

    documents: np.ndarray
    """[D] in order of reading."""
    starts: np.ndarray
    """[D + 1] tokens before each of them."""
    samples: np.ndarray
    """[N] in order of training."""
    seq_length: int

    def spans(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yields the parts of sample number `sample` of this pass, seq_length + 1 tokens together.

        A part is (document, first token, number of tokens).
        """
        position = int(self.samples[sample]) * self.seq_length
        stop = position + self.seq_length + 1
        place = int(np.searchsorted(self.starts, position, side="right")) - 1
        while position < stop:
            start, end = int(self.starts[place]), int(self.starts[place + 1])
            count = min(end, stop) - position
            yield int(self.documents[place]), position - start, count
            position += count
            place += 1


@dataclass(frozen=True)
class Stream:
    """Samples are windows of the stream of documents, seq_length + 1 tokens each."""

    seq_length: int

    @property
    def name(self) -> str:
        return f"length{self.seq_length}"

    @property
    def needs(self) -> str:
        return f"seq_length + 1 = {self.seq_length + 1}"

    def samples(self, tokens: int, lengths: np.ndarray) -> int:
        return samples_per_epoch(tokens, self.seq_length)

    def build(self, lengths: np.ndarray, key: int) -> np.ndarray:
        return build_epoch(lengths, self.seq_length, key)

    def stored(self, documents: int, samples: int) -> int:
        return 2 * documents + 1 + samples

    def order(self, index: np.ndarray, lengths: np.ndarray) -> EpochOrder:
        documents = len(lengths)
        starts = index[documents : 2 * documents + 1]
        return EpochOrder(index[:documents], starts, index[2 * documents + 1 :], self.seq_length)


class BlendPattern:
    """Which corpus sample i comes from, and which of that corpus's samples it is.

    One block of BLEND_BLOCK samples is assigned greedily (each to the corpus furthest behind its
    share, by Megatron-core's build_blending_indices) and repeated for ever, so that any position
    costs the same and a longer run has a shorter one as its prefix.
    """

    def __init__(self, weights: list[float], block: int = BLEND_BLOCK) -> None:
        """weights: [K] relative shares, above 0.

        Raises UserError for a share too small to occur in a block.
        """
        self._single = len(weights) == 1
        if self._single:
            return
        from pretrain.data.indexed import helpers

        shares = np.array(weights, dtype=np.float64) / sum(weights)
        if shares[number := int(shares.argmin())] * block < 1:
            rare = f"data.corpora.{number}.weight={weights[number]:g}: less than one sample in {block}"
            raise UserError(f"{rare}; raise the weight or leave the corpus out")
        self._block = block
        self._corpus = np.zeros(block, dtype=np.int16)  # [block]
        self._rank = np.zeros(block, dtype=np.int64)  # [block] samples of the same corpus before this one
        helpers.build_blending_indices(self._corpus, self._rank, shares, len(weights), block, False)
        self._counts = np.bincount(self._corpus, minlength=len(weights))  # [K]

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (corpus, sample within that corpus) of sample `index`.

        Raises IndexError for a negative index.
        """
        if index < 0:
            raise IndexError(f"sample {index}: positions start at 0")
        if self._single:
            return 0, index
        block, place = divmod(index, self._block)
        corpus = int(self._corpus[place])
        return corpus, block * int(self._counts[corpus]) + int(self._rank[place])

    def until(self, available: list[int], most: int) -> int:
        """How many samples come before the first one of a corpus of which `available` were taken,
        at most `most`.
        """
        if self._single:
            return min(available[0], most)
        low, high = 0, min(most, sum(available))
        while low < high:  # the first position by which a corpus has given too many
            middle = (low + high) // 2
            low, high = (low, middle) if any(self._taken(middle + 1) > available) else (middle + 1, high)
        return low

    def taken(self, samples: int) -> list[int]:
        """How many of the first samples come from each corpus."""
        return [samples] if self._single else [int(count) for count in self._taken(samples)]

    def _taken(self, samples: int) -> np.ndarray:
        """As `taken`, [K], of several corpora."""
        blocks, rest = divmod(samples, self._block)
        return blocks * self._counts + np.bincount(self._corpus[:rest], minlength=len(self._counts))


def micro_batch_indices(
    step: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    global_batch_size: int,
) -> range:
    """Returns the samples of one forward pass of one process.

    Step s (from 0) consumes samples [s G, (s + 1) G), each exactly once over all processes.
    Raises ValueError where the global batch does not divide into micro-batches over dp_size
    processes, and for a position outside the step.
    """
    batch = f"global batch of {global_batch_size}"
    rounds, rest = divmod(global_batch_size, micro_batch_size * dp_size)
    if rest:
        divided = f"micro-batches of {micro_batch_size} over {dp_size} processes"
        raise ValueError(f"a {batch} does not divide into {divided}")
    if not 0 <= micro_batch < rounds or not 0 <= dp_rank < dp_size or step < 0:
        place = f"rank {dp_rank} of {dp_size} in step {step}"
        raise ValueError(f"no micro-batch {micro_batch} on {place} with a {batch}")
    first = step * global_batch_size + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(first, first + micro_batch_size)
