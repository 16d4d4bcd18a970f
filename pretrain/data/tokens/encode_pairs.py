"""What a worker process does with pairs of texts. Must stay free of torch and Megatron."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pretrain.data.manifest import SPLITS
from pretrain.data.reading.pairs import Sides, pair_of
from pretrain.data.reading.raw_record import Broken, Record
from pretrain.data.tokens.encode import EncodedBatch, gathered, split_of
from pretrain.data.tokens.tokenizer import Tokenizer


def digest_of(source: str) -> bytes:
    """What tells a source from others."""
    return hashlib.blake2b(source.encode(), digest_size=8).digest()


@dataclass(frozen=True)
class HeldOut:
    """Inputs that are a split of their own."""

    files: Mapping[str, int]
    """Names of their files, with the number of the split."""
    sources: frozenset[bytes]
    """`digest_of` all their sources, which no other file gives to any split."""


@dataclass(frozen=True)
class PairJob:
    """What every worker needs to know."""

    tokenizer: str
    """Path of the model file."""
    sides: Sides
    max_tokens: int
    """Of a side with its end mark."""
    split: tuple[float, float, float]
    """Shares of train, validation and test, adding up to 1."""
    seed: int
    held: HeldOut
    marked: bool = False
    """Names of special tokens in texts stand for those tokens."""

    @staticmethod
    def pair(record: Record, sides: Sides) -> tuple[str, str] | Broken:
        """As `pair_of`."""
        return pair_of(record, sides)

    @staticmethod
    def source(record: Record, text: str) -> bytes:
        """What tells the source of a pair from others."""
        return digest_of(text)

    def encoder(self) -> PairEncoder:
        """As `Job`."""
        return PairEncoder(self)


class PairEncoder:
    """Turns batches of pairs into tokens. One for each process."""

    def __init__(self, job: PairJob) -> None:
        """Raises UserError when the tokenizer cannot be loaded."""
        self.job = job
        self.tokenizer = Tokenizer(job.tokenizer)
        self._end_mark = np.array([self.tokenizer.eod_id], dtype=self.tokenizer.dtype).tobytes()

    def encode(self, batch: list[Record], size: int) -> EncodedBatch:
        """Encodes the pairs of a batch; order is kept within each split.

        The split of a pair follows from its source or its file. No source is on both sides of it.
        """
        result = EncodedBatch(records=len(batch), size=size)
        kept = self.kept(batch, result)
        texts = [source for _, source, _ in kept], [target for _, _, target in kept]
        sources, targets = (self._documents(side) for side in texts)
        fitting = [self._fits(kept[at][0], sources[at], targets[at], result) for at in range(len(kept))]
        key_of = [self._split(record, source) for record, source, _ in kept]
        itemsize = len(self._end_mark)
        parts = []
        for split in range(len(SPLITS)):
            chosen = [fits and own == split for fits, own in zip(fitting, key_of, strict=True)]
            for own_texts, documents in zip(texts, (sources, targets), strict=True):
                sizes = [len(text.encode()) for text in own_texts]
                parts.append(gathered(documents, sizes, itemsize, chosen))
        result.splits = tuple(parts)
        return result

    def kept(self, batch: list[Record], result: EncodedBatch) -> list[tuple[Record, str, str]]:
        """Records with two texts that no other split has; the others are counted in the result."""
        held = self.job.held
        kept: list[tuple[Record, str, str]] = []
        for record in batch:
            found = self.job.pair(record, self.job.sides)
            if isinstance(found, Broken):
                result.broken.append(found)
                continue
            blank = [not text.strip() for text in found]
            if all(blank):
                result.empty += 1
            elif any(blank):
                side = self.job.sides[blank.index(True)]
                result.one_side.append(Broken(record.file, record.line, f"{side!r} is empty"))
            elif (
                held.sources
                and record.file not in held.files
                and self.job.source(record, found[0]) in held.sources
            ):
                result.held_out += 1
            else:
                kept.append((record, *found))
        return kept

    def _split(self, record: Record, source: str) -> int:
        own = self.job.held.files.get(record.file)
        return split_of(source.encode(), self.job.seed, self.job.split) if own is None else own

    def _documents(self, texts: list[str]) -> list[bytes]:
        return [ids + self._end_mark for ids in self.tokenizer.encode_documents(texts, self.job.marked)]

    def _fits(self, record: Record, source: bytes, target: bytes, result: EncodedBatch) -> bool:
        """Whether a pair is short enough; one that is not is named in the result."""
        lengths = [len(side) // len(self._end_mark) for side in (source, target)]
        if max(lengths) <= self.job.max_tokens:
            return True
        longer = lengths.index(max(lengths))
        reason = f"{self.job.sides[longer]!r} has {lengths[longer]} tokens, the most is {self.job.max_tokens}"
        result.too_long.append(Broken(record.file, record.line, reason))
        return False
