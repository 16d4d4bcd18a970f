"""The .bin and .idx files of a split, without Megatron-core: are they what dataset.json says?"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from model.errors import UserError
from model.hf.tokenizer.table import tokenizer_file
from pretrain.data.manifest import AGAIN, MANIFEST, PAIRED, Manifest, SplitFacts
from pretrain.data.tokens.tokenizer import token_dtype

HEADER = struct.Struct("<9sQBQQ")
"""Of an .idx file: magic, version, code of the tokens' type, sequences, documents + 1."""
MAGIC = b"MMIDIDX\0\0"
TYPE_CODES = {np.dtype(np.uint8): 1, np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
PER_DOCUMENT = 4 + 8 + 8
"""Bytes of an .idx file for each document: its length, its place, its number."""
SAMPLE_BLOCKS, BLOCK_BYTES = 16, 1 << 14
"""Blocks of each file that are compared at every start, spread evenly over it."""
CHUNK_BYTES = 1 << 23
DOCUMENTS = 1 << 20
"""Documents looked at together."""


class DamagedDataError(UserError):
    """Tokens or an index that are damaged, which one process of a run may meet alone."""


def stored_dtype(manifest: Manifest, split: str) -> np.dtype:
    """The element type of the .bin file of a split."""
    if holds_frames(manifest, split):
        return np.dtype(np.uint16)
    return np.dtype(np.uint8 if manifest.images is not None else token_dtype(manifest.vocab_size))


def stored_values(manifest: Manifest, split: str) -> int:
    """How many values such an element may have."""
    if holds_frames(manifest, split):
        return 1 << 16
    return 256 if manifest.images is not None else manifest.vocab_size


def holds_frames(manifest: Manifest, split: str) -> bool:
    """Whether the files of a split hold filterbanks of speech."""
    return manifest.speech is not None and split in {sides[0] for sides in PAIRED.values()}


def split_prefix(folder: str | Path, split: str, manifest: Manifest) -> str:
    """Returns the path of a split's files without their suffix.

    Raises UserError when the split is not there, or its files have another size or kind than they
    must have.
    """
    if problem := size_problem(folder, split, manifest):
        raise UserError(f"data set {folder}: {problem}; {AGAIN}")
    return str(Path(folder) / split)


def size_problem(folder: str | Path, split: str, manifest: Manifest) -> str:
    """What is wrong with the sizes and first bytes of a split's files; empty if nothing is."""
    facts = manifest.facts(folder, split)
    dtype = stored_dtype(manifest, split)
    sizes = {
        f"{split}.bin": facts.tokens * dtype.itemsize,
        f"{split}.idx": HEADER.size + PER_DOCUMENT * facts.documents + 8,
    }
    for name, expected in sizes.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != expected:
            return f"{name} has {found} bytes, by {MANIFEST} it has {expected}"
    header = HEADER.pack(MAGIC, 1, TYPE_CODES[dtype], facts.documents, facts.documents + 1)
    with (Path(folder) / f"{split}.idx").open("rb") as file:
        return "" if file.read(HEADER.size) == header else f"{split}.idx has a damaged beginning"


def check_start(folder: str | Path, split: str, manifest: Manifest) -> None:
    """Compares, in milliseconds, what may be damaged at equal size: the tokenizer, and a sample.

    Blocks of both files of the split are compared with their checksum, and their tokens with the
    vocabulary. Raises UserError for what is damaged or was exchanged.
    """
    if problem := tokenizer_problem(folder, manifest):
        raise UserError(f"data set {folder}: {problem}; {AGAIN}")
    facts = manifest.facts(folder, split)
    digest, tokens = sample(Path(folder) / split)
    if facts.sample_sha256 is not None and digest != facts.sample_sha256:
        raise damaged(folder, split, f"not what {MANIFEST} says")
    if found := beyond(tokens, stored_dtype(manifest, split), stored_values(manifest, split)):
        raise damaged(folder, split, f"token {found[1]} in a vocabulary of {manifest.vocab_size}")


def damaged(folder: str | Path, split: str, reason: object) -> DamagedDataError:
    """The error where the files of a split turn out to be damaged. reason: in a few words."""
    files, look = f"{split}.bin or {split}.idx", f"`fathom data verify {folder}` says where"
    return DamagedDataError(f"data set {folder}: {files} is damaged ({reason}); {look}; {AGAIN}")


def tokenizer_problem(folder: str | Path, manifest: Manifest) -> str:
    """What is wrong with the tokenizer of a data set; empty if nothing is, or images need none."""
    if manifest.images is not None:
        return ""
    path = tokenizer_file(folder)
    if path.exists() and not path.is_file():
        return f"{path.name} is no regular file"
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        return f"{path.name} is damaged or another than the data were prepared with"
    return ""


def sample(prefix: Path) -> tuple[str, bytes]:
    """The checksum of some blocks of both files of a split, and the blocks of its tokens."""
    tokens = b"".join(_blocks(prefix.with_suffix(".bin")))
    digest = hashlib.sha256(tokens)
    for block in _blocks(prefix.with_suffix(".idx")):
        digest.update(block)
    return digest.hexdigest(), tokens


def _blocks(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= SAMPLE_BLOCKS * BLOCK_BYTES:
            yield file.read()
            return
        for number in range(SAMPLE_BLOCKS):
            # A multiple of four bytes, so that it begins with a token.
            file.seek((size - BLOCK_BYTES) * number // (SAMPLE_BLOCKS - 1) // 4 * 4)
            yield file.read(BLOCK_BYTES)


def chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, some megabytes at a time."""
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def file_sha256(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    for data in chunks(path):
        digest.update(data)
    return digest.hexdigest()


def beyond(data: bytes, dtype: np.dtype, vocab_size: int) -> tuple[int, int] | None:
    """(position, token) of the first token that is not in the vocabulary; None if all are."""
    # A negative one becomes a huge one.
    tokens = np.frombuffer(data, dtype=dtype).view(f"u{dtype.itemsize}")
    if not len(tokens) or tokens.max() < vocab_size:
        return None
    place = int(np.argmax(tokens >= vocab_size))
    return place, int(np.frombuffer(data, dtype=dtype)[place])


def index_problem(
    prefix: Path, facts: SplitFacts, dtype: np.dtype, begin_id: int | None = None, eod_id: int | None = None
) -> str:
    """What is wrong with the index of a split whose sizes are right; empty if nothing is.

    Documents must follow each other without a gap and fill the .bin file.
    begin_id, eod_id: the tokens that each of them must begin and end with; without them the index
    is looked at alone, which is quick.
    """
    count, offset = facts.documents, HEADER.size
    index = np.memmap(prefix.with_suffix(".idx"), mode="r")
    lengths = index[offset : offset + 4 * count].view("<i4")
    places = index[offset + 4 * count : offset + 12 * count].view("<i8")
    numbers = index[offset + 12 * count :].view("<i8")
    tokens = np.memmap(prefix.with_suffix(".bin"), mode="r", dtype=dtype) if facts.tokens else None
    end = 0
    for first in range(0, count, DOCUMENTS):
        some = slice(first, min(first + DOCUMENTS, count))
        ends = end + np.cumsum(lengths[some], dtype=np.int64)
        starts = ends - lengths[some]
        if (lengths[some] < 1).any() or ends[-1] > facts.tokens:
            return "lengths of documents that cannot be"
        if (places[some] != starts * dtype.itemsize).any():
            return "documents that do not follow each other"
        if (numbers[some] != np.arange(some.start, some.stop)).any():
            return "documents out of order"
        if eod_id is not None and tokens is not None and (tokens[ends - 1] != eod_id).any():
            return "documents without their end mark"
        if begin_id is not None and tokens is not None and (tokens[starts] != begin_id).any():
            return "documents without the mark at their begin"
        end = int(ends[-1])
    if end != facts.tokens or numbers[-1] != count:
        return "documents that do not fill the .bin file"
    return ""
