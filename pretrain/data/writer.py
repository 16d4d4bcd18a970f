"""The files of a data set while they are written: tokens in batches, and what is counted."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict

import numpy as np

from model.errors import UserError
from model.words import printable
from pretrain.data.frequencies import write_counts
from pretrain.data.manifest import BrokenFacts, BrokenRecords, SplitFacts, SplitName
from pretrain.data.reading.documents import Broken
from pretrain.data.token_files import file_sha256, sample
from pretrain.data.tokens.encode import SPLITS, EncodedBatch, EncodedSplit
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


class DatasetOutput:
    """The three splits being written to a folder, and what is counted on the way."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, strict: bool) -> None:
        """Writes nothing yet. strict: refuse the first broken record."""
        self.folder, self.tokenizer, self.strict = folder, tokenizer, strict
        self.splits: list[_SplitWriter] = []
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.documents = self.tokens = self.bytes = self.empty = self.broken = 0
        self.examples: list[Broken] = []

    def add(self, result: EncodedBatch) -> None:
        """Appends one batch; batches must come in input order.

        Raises UserError for a broken record with `strict`.
        """
        if result.broken and self.strict:
            raise UserError(f"{result.broken[0].place}; without --strict it would be left out and reported")
        if not self.splits:
            # Made late: loading Megatron-core takes seconds, in which the workers already encode.
            self.splits = [_SplitWriter(self.folder / name, self.tokenizer) for name in SPLITS]
        for writer, part in zip(self.splits, result.splits, strict=True):
            writer.add(part)
        train = np.frombuffer(result.splits[0].tokens, dtype=self.tokenizer.dtype)
        self.counts += np.bincount(train, minlength=len(self.counts))
        self.documents += sum(len(part.lengths) for part in result.splits)
        self.tokens += sum(int(part.lengths.sum()) for part in result.splits)
        self.bytes += result.size
        self.empty += result.empty
        self.broken += len(result.broken)
        self.examples.extend(result.broken[: BROKEN_EXAMPLES - len(self.examples)])

    def finish(self) -> Written:
        """Closes the files and returns the manifest's fields about them.

        Raises UserError when nothing is there to train on.
        """
        if not self.documents:
            detail = f", {self.broken} broken, the first: {self.examples[0].place}" if self.broken else ""
            raise UserError(f"INPUT: no documents ({self.empty} empty{detail})")
        if not self.counts.any():
            none = f"none of the {self.documents} documents fell into train"
            raise UserError(f"--split: {none}; give more documents or a larger first number")
        probabilities = self.counts[self.counts > 0] / self.counts.sum()
        examples = tuple(_shown(broken) for broken in self.examples)
        return {
            "splits": {name: writer.finish() for name, writer in zip(SPLITS, self.splits, strict=True)},
            "unigram_entropy_nats": float(-(probabilities * np.log(probabilities)).sum()),
            "token_correlation": float((probabilities**2).sum()),
            "token_counts_sha256": write_counts(self.folder, self.counts),
            "empty_documents": self.empty,
            "broken": BrokenRecords(count=self.broken, examples=examples),
        }


def _shown(broken: Broken) -> BrokenFacts:
    """As it stands in dataset.json, which can hold neither every name nor any length."""
    file, reason = printable(broken.file, NAME), printable(broken.reason, REASON)
    return BrokenFacts(file=file, line=broken.line, reason=reason)


class _SplitWriter:
    """One .bin and .idx. Whole batches go to the .bin; Megatron-core's builder writes the .idx."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from pretrain.data.indexed import IndexedDatasetBuilder

        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=tokenizer.dtype)
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
