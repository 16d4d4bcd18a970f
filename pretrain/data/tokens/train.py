"""Training of a tokenizer that keeps every text exactly, of any kind in TRAINERS.

Code, indentation, any byte of UTF-8.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model.errors import UserError
from model.files import atomic_write_bytes, check_output
from model.hf.tokenizer.special import SPECIAL, Role, names_mask, names_sentinel
from model.hf.tokenizer.tokenizer_json import FILE
from model.words import printable
from pretrain.data.reading.documents import Broken, records, text_of
from pretrain.data.reading.inputs import InputFile, find_sources
from pretrain.data.reading.pairs import Sides, pair_files, pair_of, pair_records
from pretrain.data.tokens.reserved import Reserved, Trainer
from pretrain.data.tokens.train_bytes import ByteTrainer
from pretrain.data.tokens.train_sentencepiece import SentencePieceTrainer

ModelType = Literal["bpe", "unigram", "bpe-bytes"]
TRAINERS: dict[ModelType, Trainer] = {
    "bpe": SentencePieceTrainer("bpe"),
    "unigram": SentencePieceTrainer("unigram"),
    "bpe-bytes": ByteTrainer(),
}
"""Another kind is an entry here, and a file beside this one."""
LEAST_SHARE = 1 << 20
"""Bytes that a file may give at least, so that of many small files not all are read."""
LONGEST_NAME = 64
"""Characters of a special token's name."""
SENTINELS, MOST_SENTINELS = 100, 10_000
"""How many where no number is given, as in T5; and most of them."""
_PIECES_OF_TEXT = re.compile(r".{1,4000}(?:\n|\Z)|.{1,4000}", re.DOTALL)


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained, from how much."""

    path: str
    sha256: str
    vocab_size: int
    model: ModelType
    documents: int
    bytes: int
    """UTF-8 bytes of the sample."""
    broken: int
    """Records that gave no text."""
    special: dict[Role, str] = field(default_factory=dict)
    """Names of special tokens that were asked for."""
    sentinels: int = 0
    """Tokens beside them that stand for hidden spans."""


@dataclass(frozen=True)
class Reading:
    """How text is read."""

    text_key: str = "text"
    streaming: bool = True
    """Read a hub data set without downloading it whole."""
    sides: Sides | None = None
    """Read both sides of pairs instead."""

    def texts(self, shard: InputFile) -> Iterator[tuple[str, bytes] | Broken]:
        """The texts of a file, as strings and in UTF-8, or what is wrong with them."""
        if self.sides is None:
            for record in records(shard, self.text_key, self.streaming):
                yield text_of(record, self.text_key)
            return
        for file in pair_files([shard], self.sides):
            for record in pair_records(file, self.sides, self.streaming):
                found = pair_of(record, self.sides)
                yield from (
                    (found,) if isinstance(found, Broken) else ((text, text.encode()) for text in found)
                )


def train_tokenizer(
    inputs: list[str],
    out: str | Path,
    vocab_size: int = 4096,
    model: ModelType = "bpe",
    max_bytes: int = 10_000_000,
    reading: Reading | None = None,
    special: Reserved | None = None,
) -> TrainedTokenizer:
    """Trains on a sample of the inputs and writes the tokenizer.

    out: a file; a folder, or the main file in it, for a kind that is several files.

    inputs: as for `fathom data prepare`. max_bytes: of the sample in UTF-8, at most, about.
    special: as `special_names` returns them.
    The same inputs and settings give the same file: the sample, its order and the number of threads
    are fixed.
    Raises UserError when the sample is empty or cannot fill the vocabulary, or a setting is out of
    range.
    """
    special = special or Reserved()
    trainer = TRAINERS[model]
    fixed = trainer.fixed(special)
    if vocab_size <= fixed:
        taken = f"{fixed} pieces are taken by bytes and marks"
        raise UserError(f"--vocab-size {vocab_size}: {taken}; use at least {fixed + 100}")
    if max_bytes < 1:
        raise UserError(f"--max-bytes {max_bytes}: must be at least 1")
    folder = trainer.folder(Path(out))
    check_output(out if folder is None else folder / FILE, "--out")
    reading = reading or Reading()
    sample = _Sample(inputs, max_bytes, reading)
    pieces = list(sample)
    if not any(piece.strip("\r\n") for piece in pieces):
        raise UserError(f"INPUT {' '.join(inputs)}: no text to train on{sample.first_broken}")
    files = trainer.train(pieces, vocab_size, special, sample.bytes)
    try:
        for name, data in files.items():
            atomic_write_bytes(Path(out) if folder is None else folder / name, data)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    main, data = next(iter(files.items()))
    return TrainedTokenizer(
        str(out if folder is None else folder / main),
        hashlib.sha256(data).hexdigest(),
        vocab_size,
        model,
        sample.documents,
        sample.bytes,
        sample.broken,
        dict(special.names),
        special.sentinels,
    )


def special_names(given: str) -> Reserved:
    """Reads --special: which special tokens there shall be.

    `mask,pad`, `cls=<s>,mask=<mask>`, `pad,sentinels=100`; `all` stands for all that have a name.
    Raises UserError for what they cannot be called.
    """
    names: dict[Role, str] = {}
    sentinels = 0
    for entry in ",".join(SPECIAL).split(",") if given == "all" else given.split(","):
        key, equals, name = (part.strip() for part in entry.partition("="))
        if key == "sentinels":
            sentinels = _sentinels(name) if equals else SENTINELS
            continue
        role = next((role for role in SPECIAL if role == key), None)
        if role is None:
            each = ", ".join(f"{name} ({special.purpose})" for name, special in SPECIAL.items())
            known = f"there are {each}, all of these, and sentinels (stand for hidden spans)"
            raise UserError(f"--special {printable(given)}: no special token {printable(key)!r}; {known}")
        taken = [other for other_role, other in names.items() if other_role != role]
        names[role] = name if equals else SPECIAL[role].name
        if problem := _name_problem(role, names[role], taken):
            raise UserError(f"--special {printable(given)}: {printable(names[role])!r} {problem}")
    return Reserved(names, sentinels)


def _sentinels(given: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", given) or not 1 <= int(given) <= MOST_SENTINELS:
        wanted = f"give a number from 1 to {MOST_SENTINELS}"
        raise UserError(f"--special sentinels={printable(given)}: {wanted}, one for each span of a text")
    return int(given)


def _name_problem(role: Role, name: str, others: list[str]) -> str:
    """Why a special token cannot have a name; empty if it can."""
    if not re.fullmatch(r"[\[<][\w|/.+-]+[\]>]", name, re.ASCII) or len(name) > LONGEST_NAME:
        shape = "letters, digits and _|/.+- in brackets, such as [MASK] or <|mask|>"
        return f"is no name of a special token: give at most {LONGEST_NAME} characters, {shape}"
    if name in others or name == "<unk>" or names_sentinel(name) or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
        return "is the name of another token: give each its own"
    if role == "mask" and not names_mask(name):
        return "does not tell what it is for: call the mask token [MASK], <mask> or <|mask|>"
    if role != "mask" and names_mask(name):
        return "is what only the mask token can be called: give it another"
    return ""


class _Sample:
    """Pieces of text from the inputs, at most `max_bytes`; what was taken is counted.

    Files are visited in an order that does not follow their names, and none gives more than its
    share, so that a sample of a large input covers it.
    """

    def __init__(self, inputs: list[str], max_bytes: int, reading: Reading) -> None:
        self.max_bytes, self.reading = max_bytes, reading
        shards = [shard for source in find_sources(inputs) for shard in source.shards]
        self.shards = sorted(shards, key=lambda shard: hashlib.sha256(os.fsencode(shard.group)).digest())
        self.share = max(max_bytes // len(self.shards), LEAST_SHARE)
        self.documents = self.bytes = self.broken = 0
        self.first_broken = ""

    def __iter__(self) -> Iterator[str]:
        for shard in self.shards:
            for text in self._texts(shard, min(self.share, self.max_bytes - self.bytes)):
                yield from _PIECES_OF_TEXT.findall(text)
            if self.bytes >= self.max_bytes:
                return

    def _texts(self, shard: InputFile, limit: int) -> Iterator[str]:
        taken = 0
        for found in self.reading.texts(shard):
            if isinstance(found, Broken):
                self.first_broken = self.first_broken or f"; {found.place}"
                self.broken += 1
                continue
            text, data = found
            if len(data) > limit - taken:
                text = data[: limit - taken].decode("utf-8", errors="ignore")
            taken += len(data)
            self.documents += bool(text)
            self.bytes += len(text.encode())
            if text:
                yield text
            if taken >= limit:
                return
