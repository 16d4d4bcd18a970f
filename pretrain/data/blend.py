"""Tokens for training: blends of prepared data sets, read by position.

A run resumes exactly because sample i is the same whoever asks, and when.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.frequencies import log_frequencies, token_counts
from pretrain.data.index_cache import build_once, cache_folder
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import AGAIN, Manifest, fingerprint, load_manifest
from pretrain.data.order import (
    INDEX_VERSION,
    BlendPattern,
    Cut,
    Order,
    Stream,
    epoch_key,
    micro_batch_indices,
)
from pretrain.data.passes import EPOCHS_OPEN
from pretrain.data.prefetch import Prefetcher
from pretrain.data.token_files import check_start, damaged, index_problem, split_prefix
from pretrain.data.tokens.tokenizer import token_dtype

STORED_FROM = 1 << 17
"""Numbers of an index that later passes store too.

Shorter ones take each process milliseconds, and a run may go over little data a million times.
"""

__all__ = ["Prefetcher", "TokenBlend", "micro_batch_indices", "open_blend"]


class _CorpusReader:
    """The samples of one split of one data set, pass after pass."""

    def __init__(
        self,
        path: str,
        split: str,
        cut: Cut,
        seed: int,
        cache: Path,
        alone: bool,
    ) -> None:
        self.path, self.split, self.cut = path, split, cut
        self.cache, self.alone = cache, alone
        self.manifest = load_manifest(path)
        if self.manifest.images is not None:
            raise UserError(f"data set {path} holds images, which only train.task=classification reads")
        self.prefix = split_prefix(path, split, self.manifest)
        check_start(path, split, self.manifest)
        self.facts = self.manifest.facts(path, split)
        if not self.facts.tokens:
            raise UserError(self._too_short())
        self.fingerprint = fingerprint(self.manifest, split)
        # Evaluations are compared between runs, so their order depends neither on the run's seed
        # nor on the pass.
        self.fixed = split != "train"
        self.seed = 0 if self.fixed else seed
        try:
            self.dataset = IndexedDataset(self.prefix)
        except Exception as error:  # whatever the reader meets in a file that was overwritten
            raise damaged(path, split, error) from error
        self.samples = cut.samples(self.facts.tokens, self.dataset.sequence_lengths)
        if self.samples < 1:
            raise UserError(self._too_short())
        self.orders: OrderedDict[int, Order] = OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread and its owner may read at once
        self.order(0)

    def _too_short(self) -> str:
        needed = f"has {self.facts.tokens} tokens, one sample needs {self.cut.needs}"
        off = "" if self.split == "train" else ", or set train.eval_samples=0"
        advice = "prepare more data or a larger share of it (--split), or lower data.seq_length"
        return f"data set {self.path}: the {self.split} split {needed}; {advice}{off}"

    def order(self, epoch: int) -> Order:
        with self._lock:
            return self._order(0 if self.fixed else epoch)

    def _order(self, epoch: int) -> Order:
        if epoch not in self.orders:
            identity = f"{self.fingerprint[:20]}-{self.split}-{self.cut.name}-seed{self.seed}"
            path = self.cache / f"{identity}-epoch{epoch}-v{INDEX_VERSION}.npy"
            length = self.cut.stored(self.facts.documents, self.samples)
            if epoch and length < STORED_FROM:
                index = self._build(epoch)
            else:
                index = build_once(path, lambda: self._build(epoch), length, self.alone)
            self.orders[epoch] = self.cut.order(index, self.dataset.sequence_lengths)
            while len(self.orders) > EPOCHS_OPEN:
                self.orders.popitem(last=False)
        return self.orders[epoch]

    def _build(self, epoch: int) -> np.ndarray:
        dtype = np.dtype(token_dtype(self.manifest.vocab_size))
        if problem := index_problem(Path(self.prefix), self.facts, dtype):
            raise UserError(f"data set {self.path}: {self.split}.idx has {problem}; {AGAIN}")
        key = epoch_key(self.seed, self.fingerprint, epoch)
        return self.cut.build(self.dataset.sequence_lengths, key)

    def spans(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yields (document, first token, number of tokens) of the parts of a sample.

        sample: counted over all passes.
        """
        epoch, place = divmod(sample, self.samples)
        return self.order(epoch).spans(place)

    def read(self, sample: int, out: np.ndarray, segments: np.ndarray | None = None) -> None:
        """Fills out [seq_length + 1] with sample number `sample`, counted over all passes.

        What the sample leaves stays as it is.
        segments: the same shape, filled with the number of each token's document, from 1.
        """
        filled, segment, last = 0, 0, -1
        try:
            for document, first, count in self.spans(sample):
                out[filled : filled + count] = self.dataset.get(document, offset=first, length=count)
                if segments is not None:
                    segment, last = segment + (document != last), document
                    segments[filled : filled + count] = segment
                filled += count
        except (ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise damaged(self.path, self.split, error) from error


def _tokens(manifest: Manifest) -> tuple[str, int, int]:
    """What must be the same in all data sets of a blend."""
    return manifest.tokenizer_sha256, manifest.vocab_size, manifest.eod_id


class Reader(Protocol):
    """One split of one data set, read sample by sample."""

    path: str
    manifest: Manifest
    fingerprint: str
    samples: int
    """Of one pass."""
    cache: Path
    alone: bool


class Blend:
    """Samples of several data sets, mixed by weight."""

    manifests: list[Manifest]
    """Of each corpus."""
    fingerprints: list[str]
    """Names of each corpus's tokens, the same wherever it lies."""
    samples_per_epoch: list[int]
    """Of each corpus."""
    vocab_size: int
    """Without padding."""
    seq_length: int
    """Labels of a sample."""

    def __init__(self, readers: Sequence[Reader], weights: list[float]) -> None:
        self._corpora = readers
        self._pattern = BlendPattern(weights)
        self.weights = weights
        self.manifests = [reader.manifest for reader in readers]
        self.fingerprints = [reader.fingerprint for reader in readers]
        self.samples_per_epoch = [reader.samples for reader in readers]
        self.vocab_size = self.manifests[0].vocab_size
        self.eod_id = self.manifests[0].eod_id

    @property
    def padding_share(self) -> float | None:
        """Share of the places of a sample that hold no token; None where all hold one, or where it
        is not known.
        """
        return None

    def tokens_before(self, sample: int) -> int:
        """How many tokens the first `sample` samples have, as a run counts what it has trained on.

        Reads none.
        """
        return sample * self.seq_length

    def log_frequencies(self) -> torch.Tensor:
        """log p of every token in the training splits, float64 [v]. Raises as `token_counts`."""
        counts = [
            token_counts(Path(reader.path), reader.manifest, reader.cache, reader.alone)
            for reader in self._corpora
        ]
        return torch.from_numpy(log_frequencies(counts, self.weights))

    def without_repetition(self, most: int) -> int:
        """How many samples from the first on come before one that was there already, at most
        `most`.
        """
        return self._pattern.until(self.samples_per_epoch, most)


class TokenBlend(Blend):
    """Samples of texts. Made by `open_blend`."""

    def __init__(self, readers: list[_CorpusReader], weights: list[float]) -> None:
        super().__init__(readers, weights)
        self._readers = readers
        self.seq_length = readers[0].cut.seq_length

    def sample(self, index: int) -> np.ndarray:
        """Returns tokens [seq_length + 1], int64, of sample `index`: inputs [:-1], targets [1:].

        A pure function of the data sets, weights, seed, seq_length and index. There is no last
        sample: each pass over a corpus has an order of its own.
        Raises IndexError for a negative index, UserError for damaged data.
        """
        return self._read([index])[0]

    def batch(self, indices: Iterable[int]) -> torch.Tensor:
        """Returns tokens [n, seq_length + 1], int64, of the samples named. Raises as `sample`."""
        return torch.from_numpy(self._read([int(index) for index in indices]))

    def window(self, index: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of sample `index`, [seq_length] int64, and their documents' numbers.

        These count within the sample from 1, [seq_length] int64. They are 0 where the sample leaves
        room, which is filled with `padding`. Raises as `sample`.
        """
        segments = np.zeros((1, self.seq_length + 1), dtype=np.int64)
        tokens = self._read([index], segments, padding)
        return tokens[0, :-1], segments[0, :-1]

    def extent(self, index: int) -> tuple[int, int]:
        """Returns how many tokens `window` gives, and how many of them mark an end or a begin.

        Reads no tokens.
        """
        corpus, sample = self._pattern.locate(index)
        reader, room, marks = self._readers[corpus], self.seq_length, 0
        for document, first, length in reader.spans(sample):
            if not (count := min(length, room)):
                break  # what follows a window is a decoder's last target
            room -= count
            marks += first + count == int(reader.dataset.sequence_lengths[document])
            marks += first == 0 and reader.manifest.begin_id is not None
        return self.seq_length - room, marks

    def _read(self, wanted: list[int], segments: np.ndarray | None = None, padding: int = 0) -> np.ndarray:
        """Tokens [n, seq_length + 1] of samples.

        segments: of their shape, filled as `window` says.
        """
        out = np.full((len(wanted), self.seq_length + 1), padding, dtype=np.int64)
        for row, index in enumerate(wanted):
            corpus, sample = self._pattern.locate(index)
            self._readers[corpus].read(sample, out[row], None if segments is None else segments[row])
        # As an unsigned number a negative token is a huge one. Beyond the table of embeddings a CPU
        # raises an IndexError, and a GPU ends the process.
        if out.size and int(out.view(np.uint64).max()) >= self.vocab_size:
            raise self._beyond(out, wanted)
        return out

    def _beyond(self, out: np.ndarray, wanted: list[int]) -> UserError:
        """The error for the first token that is not in the vocabulary."""
        row, column = np.argwhere((out < 0) | (out >= self.vocab_size))[0]
        corpus, _ = self._pattern.locate(wanted[row])
        token = f"token {int(out[row, column])} in a vocabulary of {self.vocab_size}"
        reader = self._readers[corpus]
        return damaged(reader.path, reader.split, f"{token}, in sample {wanted[row]}")


def agree_on_tokens(readers: Sequence[Reader], new: Reader) -> None:
    """Raises UserError where a data set cannot stand beside others, or is there twice."""
    for earlier in readers:
        both = f"data.corpora: {earlier.path} and {new.path}"
        if _tokens(new.manifest) != _tokens(earlier.manifest):
            raise UserError(f"{both} were prepared with different tokenizers; prepare both with one")
        if new.manifest.begin_id != earlier.manifest.begin_id:
            differ = "only one of them begins its documents with a mark"
            raise UserError(f"{both}: {differ}; prepare both with --begin-mark, or both without")
        if new.fingerprint == earlier.fingerprint:
            raise UserError(f"{both} hold the same data; name it once and add up the weights")


def open_blend(
    corpora: list[Corpus],
    split: str,
    seq_length: int,
    seed: int,
    cache: Path | None,
    alone: bool = False,
    cut: Cut | None = None,
) -> TokenBlend:
    """Opens a split of one or more data sets for reading by position.

    split: "train" takes a new order for every pass, keyed by the seed; others keep one order that
    no seed changes.
    cache: folder for sample indices, shared by all processes; None: `index_cache` beside the first
    corpus. alone: no other process reads along, so that it need not be written.
    cut: what a sample is; windows of the stream of documents where None.
    Raises UserError when a data set is missing, damaged, named twice or shorter than a sample, or
    the tokenizers differ.
    """
    folder = cache_folder(cache, corpora[0].path)
    readers: list[_CorpusReader] = []
    for corpus in corpora:
        reader = _CorpusReader(corpus.path, split, cut or Stream(seq_length), seed, folder, alone)
        agree_on_tokens(readers, reader)
        readers.append(reader)
    return TokenBlend(readers, [corpus.weight for corpus in corpora])
