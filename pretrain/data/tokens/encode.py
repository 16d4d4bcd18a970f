"""What a worker process of `fathom data prepare` does: raw records in, token bytes per split out.

Must stay free of torch and Megatron.
"""

from __future__ import annotations

import hashlib
import signal
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from pretrain.data.manifest import SPLITS
from pretrain.data.reading.documents import Broken, Record, text_of
from pretrain.data.tokens.tokenizer import Tokenizer


class BatchEncoder(Protocol):
    """Turns batches of records into tokens. One for each process."""

    def encode(self, batch: list[Record], size: int) -> EncodedBatch:
        """Encodes the records of a batch; order is kept within each split."""


class Job(Protocol):
    """What every worker needs to know."""

    def encoder(self) -> BatchEncoder:
        """Of this process. Raises UserError when the tokenizer cannot be loaded."""


@dataclass(frozen=True)
class EncodeJob:
    """What every worker needs to know."""

    tokenizer: str
    """Path of the model file."""
    text_key: str
    split: tuple[float, float, float]
    """Shares of train, validation and test, adding up to 1."""
    split_by: Literal["document", "file"]
    """What is assigned to a split as a whole."""
    seed: int
    begin_id: int | None = None
    """What every document begins with."""
    marked: bool = False
    """Names of special tokens in texts stand for those tokens."""

    def encoder(self) -> Encoder:
        """As `Job`."""
        return Encoder(self)


@dataclass
class EncodedSplit:
    """The documents of one batch that belong to one split."""

    tokens: bytes
    """Of their ids, with marks of begin and end."""
    lengths: np.ndarray
    """In tokens."""
    text_bytes: int
    """Their size as UTF-8."""


@dataclass
class EncodedBatch:
    """The result for one batch of records."""

    records: int
    """That went in."""
    size: int
    """Bytes that went in."""
    splits: tuple[EncodedSplit, ...] = ()
    empty: int = 0
    broken: list[Broken] = field(default_factory=list)
    one_side: list[Broken] = field(default_factory=list)
    """Pairs of which one side is empty."""
    too_long: list[Broken] = field(default_factory=list)
    """Pairs with too many tokens."""
    held_out: int = 0
    """Pairs whose source belongs to another split."""


class Encoder:
    """Turns batches of records into tokens. One for each process."""

    def __init__(self, job: EncodeJob) -> None:
        """Raises UserError when the tokenizer cannot be loaded."""
        self.job = job
        self.tokenizer = Tokenizer(job.tokenizer)
        self._end_mark = self._mark(self.tokenizer.eod_id)
        self._begin_mark = b"" if job.begin_id is None else self._mark(job.begin_id)

    def _mark(self, number: int) -> bytes:
        return np.array([number], dtype=self.tokenizer.dtype).tobytes()

    def encode(self, batch: list[Record], size: int) -> EncodedBatch:
        """Encodes the records of a batch; order is kept within each split."""
        result = EncodedBatch(records=len(batch), size=size)
        texts: list[str] = []
        sizes: list[int] = []
        splits: list[int] = []
        for record in batch:
            found = text_of(record, self.job.text_key)
            if isinstance(found, Broken):
                result.broken.append(found)
                continue
            text, data = found
            if not text:
                result.empty += 1
                continue
            texts.append(text)
            sizes.append(len(data))
            whole_files = self.job.split_by == "file"
            key = record.group.encode(errors="surrogateescape") if whole_files else data
            splits.append(split_of(key, self.job.seed, self.job.split))
        encoded = self.tokenizer.encode_documents(texts, self.job.marked)
        documents = [self._begin_mark + ids + self._end_mark for ids in encoded]
        result.splits = tuple(
            gathered(documents, sizes, len(self._end_mark), [own == split for own in splits])
            for split in range(len(SPLITS))
        )
        return result


def gathered(documents: list[bytes], sizes: list[int], itemsize: int, chosen: list[bool]) -> EncodedSplit:
    """Those documents of a batch that are chosen, of ids of `itemsize` bytes each.

    sizes: of their texts in UTF-8.
    """
    numbers = [number for number, own in enumerate(chosen) if own]
    lengths = np.array([len(documents[number]) // itemsize for number in numbers], dtype=np.int32)
    text_bytes = sum(sizes[number] for number in numbers)
    return EncodedSplit(b"".join(documents[number] for number in numbers), lengths, text_bytes)


def split_of(key: bytes, seed: int, shares: tuple[float, float, float]) -> int:
    """The split by a hash of (seed, key): number 0, 1 or 2.

    The key is a text itself or a file's name, so neither order nor neighbours matter.
    """
    digest = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    share = int.from_bytes(digest, "little") / 2**64
    train, validation, test = shares
    if share < train:
        return 0
    return 1 if share < train + validation or not test else 2


_encoder: BatchEncoder | None = None


def start_worker(job: Job) -> None:
    """Prepares a worker process. The parent alone answers Ctrl-C."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _encoder = job.encoder()


def encode_in_worker(batch: list[Record], size: int) -> EncodedBatch:
    """Encodes in a process that `start_worker` prepared."""
    assert _encoder is not None
    return _encoder.encode(batch, size)
