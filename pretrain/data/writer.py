"""The files of a data set while they are written: tokens in batches, and what is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np

from model.errors import UserError
from model.words import printable
from pretrain.data.frequencies import write_counts
from pretrain.data.manifest import PAIRED, SPLITS, BrokenFacts, BrokenRecords, SplitFacts, SplitName
from pretrain.data.reading.documents import Broken
from pretrain.data.token_files import file_sha256, sample
from pretrain.data.tokens.encode import EncodedBatch, EncodedSplit
from pretrain.data.tokens.tokenizer import Tokenizer

BROKEN_EXAMPLES = 20
NAME, REASON = 4096, 500
"""Characters kept of a file's name, and of what is wrong with a record."""


class Written(TypedDict):
    """Fields of a manifest."""

    splits: dict[SplitName, SplitFacts]
    unigram_entropy_nats: float
    token_correlation: float
    token_counts_sha256: str
    empty_documents: int
    broken: BrokenRecords


class Complaints:
    """How many records were left out for one reason, and the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[Broken] = []

    def add(self, found: list[Broken]) -> None:
        """Counts some more."""
        self.count += len(found)
        self.first.extend(found[: BROKEN_EXAMPLES - len(self.first)])

    def facts(self) -> BrokenRecords:
        """As they stand in dataset.json."""
        return BrokenRecords(count=self.count, examples=tuple(_shown(broken) for broken in self.first))


class Alphabet(Protocol):
    """What tokens are numbers of."""

    @property
    def vocab_size(self) -> int:
        """How many there are."""

    @property
    def dtype(self) -> type[np.generic]:
        """Of tokens in a file."""


class DatasetOutput:
    """The splits being written to a folder, and what is counted on the way."""

    names: tuple[SplitName, ...] = SPLITS
    """Of the files, in the order in which batches have them."""
    counted: int = 0
    """Which of them has the tokens that are counted."""
    what = "documents"
    """What is written, in messages."""

    def __init__(self, folder: Path, tokenizer: Alphabet, strict: bool) -> None:
        """Writes nothing yet. strict: refuse the first broken record."""
        self.folder, self.tokenizer, self.strict = folder, tokenizer, strict
        self.splits: list[_SplitWriter] = []
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.documents = self.tokens = self.bytes = self.empty = 0
        self.broken = Complaints()

    def add(self, result: EncodedBatch) -> None:
        """Appends one batch; batches must come in input order.

        Raises UserError for a broken record with `strict`.
        """
        if result.broken and self.strict:
            raise UserError(f"{result.broken[0].place}; without --strict it would be left out and reported")
        if not self.splits:
            # Made late: loading Megatron-core takes seconds, in which the workers already encode.
            self.splits = [_SplitWriter(self.folder / name, self.dtype_of(name)) for name in self.names]
        for writer, part in zip(self.splits, result.splits, strict=True):
            writer.add(part)
        self.counts += self._occurrences(result.splits[self.counted])
        self.documents += sum(len(part.lengths) for part in result.splits) * len(SPLITS) // len(self.names)
        self.tokens += sum(int(part.lengths.sum()) for part in result.splits)
        self.bytes += result.size
        self.empty += result.empty
        self.broken.add(result.broken)

    def dtype_of(self, name: SplitName) -> type[np.generic]:
        """Of what a file holds."""
        return self.tokenizer.dtype

    def _occurrences(self, part: EncodedSplit) -> np.ndarray:
        tokens = np.frombuffer(part.tokens, dtype=self.tokenizer.dtype)
        return np.bincount(tokens, minlength=len(self.counts))

    def _left_out(self) -> str:
        """What became of the records, in a phrase."""
        count, first = self.broken.count, self.broken.first
        return f"{self.empty} empty" + (f", {count} broken, the first: {first[0].place}" if count else "")

    def finish(self) -> Written:
        """Closes the files and returns the manifest's fields about them.

        Raises UserError when nothing is there to train on.
        """
        if not self.documents:
            raise UserError(f"INPUT: no {self.what} ({self._left_out()})")
        if not self.counts.any():
            none = f"none of the {self.documents} {self.what} fell into train"
            raise UserError(f"--split: {none}; give more {self.what} or a larger first number")
        probabilities = self.counts[self.counts > 0] / self.counts.sum()
        return {
            "splits": {name: writer.finish() for name, writer in zip(self.names, self.splits, strict=True)},
            "unigram_entropy_nats": float(-(probabilities * np.log(probabilities)).sum()),
            "token_correlation": correlation(self.counts),
            "token_counts_sha256": write_counts(self.folder, self.counts),
            "empty_documents": self.empty,
            "broken": self.broken.facts(),
        }


class PairOutput(DatasetOutput):
    """Two files for each split of a data set of pairs."""

    names = tuple(side for sides in PAIRED.values() for side in sides)
    counted = 1
    what = "pairs"

    def __init__(self, folder: Path, tokenizer: Tokenizer, strict: bool) -> None:
        super().__init__(folder, tokenizer, strict)
        self.source_counts = np.zeros_like(self.counts)
        self.one_side, self.too_long = Complaints(), Complaints()
        self.held_out = 0

    def add(self, result: EncodedBatch) -> None:
        """As `DatasetOutput`."""
        super().add(result)
        self.count_sources(result)
        self.one_side.add(result.one_side)
        self.too_long.add(result.too_long)
        self.held_out += result.held_out

    def count_sources(self, result: EncodedBatch) -> None:
        """Counts the tokens of the sources of train."""
        self.source_counts += self._occurrences(result.splits[0])

    def check_own(self, splits: Iterable[SplitName]) -> None:
        """splits: those with inputs of their own.

        Raises UserError for one that they gave nothing, and where nothing is left beside them.
        """
        counts = {name: self._count(PAIRED[name][0]) for name in splits}
        for name, count in counts.items():
            if not count:
                raise UserError(f"--{name}: no {self.what} in it ({self._left_out()})")
        if counts and self.documents == sum(counts.values()):
            named = " and ".join(f"--{name}" for name in counts)
            repeated = f"{self.held_out} with sources of them left out"
            raise UserError(f"INPUT: no {self.what} beside those of {named}, {repeated}")

    def _count(self, name: SplitName) -> int:
        return sum(map(len, self.splits[self.names.index(name)].lengths))

    def _left_out(self) -> str:
        others = {"with one side": self.one_side, "too long": self.too_long}
        return super()._left_out() + "".join(f", {one.count} {name}" for name, one in others.items())


def correlation(counts: np.ndarray) -> float:
    """Sum of the squared frequencies of tokens that were counted."""
    return float(((counts[counts > 0] / counts.sum()) ** 2).sum())


def _shown(broken: Broken) -> BrokenFacts:
    """As it stands in dataset.json, which can hold neither every name nor any length."""
    file, reason = printable(broken.file, NAME), printable(broken.reason, REASON)
    return BrokenFacts(file=file, line=broken.line, reason=reason)


class _SplitWriter:
    """One .bin and .idx. Whole batches go to the .bin; Megatron-core's builder writes the .idx."""

    def __init__(self, prefix: Path, dtype: type[np.generic]) -> None:
        from pretrain.data.indexed import IndexedDatasetBuilder

        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self.lengths: list[np.ndarray] = []
        self.text_bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, part: EncodedSplit) -> None:
        self.builder.data_file.write(part.tokens)
        self.sha256.update(part.tokens)
        self.lengths.append(part.lengths)
        self.text_bytes += part.text_bytes

    def finish(self) -> SplitFacts:
        lengths = np.concatenate(self.lengths)
        self.builder.sequence_lengths = lengths
        self.builder.document_indices = np.arange(len(lengths) + 1)
        self.builder.finalize(f"{self.prefix}.idx")
        return SplitFacts(
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=self.text_bytes,
            sha256=self.sha256.hexdigest(),
            index_sha256=file_sha256(self.prefix.with_suffix(".idx")),
            sample_sha256=sample(self.prefix)[0],
        )
