"""How often each token occurs in training data: counted once for each data set, mixed for a blend.

`fathom data prepare` counts on its way and keeps the counts beside the tokens. Those of data sets
of earlier versions are counted when they are first needed and kept with the sample indices.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.errors import UserError
from model.words import printable
from pretrain.data.index_cache import build_once
from pretrain.data.manifest import AGAIN, MANIFEST, Manifest, fingerprint
from pretrain.data.token_files import chunks, damaged
from pretrain.data.tokens.tokenizer import token_dtype

COUNTS = "token_counts.npy"
"""Of a data set folder: how often each token occurs in train, int64 [v]."""
COUNTS_VERSION = 1

logger = logging.getLogger(__name__)


def write_counts(folder: Path, counts: np.ndarray) -> str:
    """Writes the counts of a data set that is being prepared. Returns the file's checksum."""
    buffer = io.BytesIO()
    np.save(buffer, counts.astype("<i8"), allow_pickle=False)
    (folder / COUNTS).write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def counts_problem(folder: Path, manifest: Manifest) -> str:
    """What is wrong with the counts that were prepared; empty if nothing is."""
    path = folder / COUNTS
    if path.exists() and not path.is_file():
        return f"{COUNTS} is no regular file"
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"{COUNTS} cannot be read ({error.strerror})"
    if hashlib.sha256(content).hexdigest() != manifest.token_counts_sha256:
        return f"{COUNTS} has another checksum than {MANIFEST} says"
    try:
        counts = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        return f"{COUNTS} is no array of numbers ({printable(str(error))})"
    tokens = manifest.labels
    if counts.dtype == np.int64 and counts.shape == (manifest.vocab_size,) and counts.sum() == tokens:
        return ""
    return f"{COUNTS} does not count {tokens} tokens of a vocabulary of {manifest.vocab_size}"


def _prepared_counts(folder: Path, manifest: Manifest) -> np.ndarray:
    if problem := counts_problem(folder, manifest):
        raise UserError(f"data set {folder}: {problem}; {AGAIN}")
    return np.asarray(np.load(folder / COUNTS, allow_pickle=False))


def count_tokens(folder: Path, manifest: Manifest) -> np.ndarray:
    """Reads all tokens of train and counts them, int64 [v].

    Raises UserError for one beyond the vocabulary.
    """
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    dtype = np.dtype(token_dtype(manifest.vocab_size))
    for data in chunks(folder / f"{manifest.counted}.bin"):
        counts = add_counts(counts, np.frombuffer(data, dtype=dtype))
        if len(counts) > manifest.vocab_size:
            raise damaged(
                folder, manifest.counted, f"token {len(counts) - 1} in a vocabulary of {manifest.vocab_size}"
            )
    return counts


def add_counts(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The counts with more tokens, none of them negative; longer where one is beyond them."""
    more = np.bincount(tokens, minlength=len(counts))
    more[: len(counts)] += counts
    return more


def token_counts(folder: Path, manifest: Manifest, cache: Path, alone: bool) -> np.ndarray:
    """How often each token occurs in train, int64 [v].

    cache: where counts are kept that are not in the data set. alone: as `build_once`.
    Raises UserError for damaged data, or where `cache` is needed and cannot be written.
    """
    if manifest.token_counts_sha256 is not None:
        return _prepared_counts(folder, manifest)

    def build() -> np.ndarray:
        logger.warning("counting the tokens of %s, which was prepared by an earlier version", folder)
        return count_tokens(folder, manifest)

    name = f"{fingerprint(manifest, manifest.counted)[:20]}-{manifest.counted}-counts-v{COUNTS_VERSION}.npy"
    return build_once(cache / name, build, manifest.vocab_size, alone)


def log_frequencies(counts: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """log p of every token in a blend, float64 [v].

    One is added to each count, so that no token is impossible. Of several data sets each counts by
    its weight, whatever its size, as in training.
    """
    total = sum(weights)
    shares = sum(weight / total * one / one.sum() for one, weight in zip(counts, weights, strict=True))
    mixed = shares * sum(int(one.sum()) for one in counts) + 1
    return np.log(mixed / mixed.sum())
