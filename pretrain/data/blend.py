"""Tokens for training: blends of prepared data sets, read by position. A run resumes exactly because sample i is the same whoever asks, and when."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.index_cache import build_once
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import fingerprint, load_manifest, split_prefix
from pretrain.data.order import (
    INDEX_VERSION,
    BlendPattern,
    EpochOrder,
    build_epoch,
    epoch_key,
    micro_batch_indices,
    samples_per_epoch,
)
from pretrain.data.prefetch import Prefetcher

__all__ = ["Prefetcher", "TokenBlend", "micro_batch_indices", "open_blend"]

EPOCHS_OPEN = 2  # orders kept mapped for each corpus: prefetching may reach into the next pass


class _CorpusReader:
    """The samples of one split of one data set, pass after pass."""

    def __init__(self, path: str, split: str, seq_length: int, seed: int, cache: Path) -> None:
        self.manifest = load_manifest(path)
        prefix = split_prefix(path, split, self.manifest)
        tokens = self.manifest["splits"][split]["tokens"]
        self.samples = samples_per_epoch(tokens, seq_length)
        if not self.samples:
            raise UserError(
                f"data set {path}: the {split} split has {tokens} tokens, one sample needs seq_length + 1 = {seq_length + 1}; "
                f"prepare more data or a larger share of it (--split), or lower data.seq_length{'' if split == 'train' else ', or set train.eval_samples=0'}"
            )
        self.fingerprint = fingerprint(self.manifest, split)
        self.split, self.seq_length, self.cache = split, seq_length, cache
        # Evaluations are compared between runs, so their order depends neither on the run's seed nor on the pass.
        self.fixed = split != "train"
        self.seed = 0 if self.fixed else seed
        try:
            self.dataset = IndexedDataset(prefix)
        except Exception as error:  # whatever the reader meets in a file that was cut short or overwritten
            raise UserError(
                f"data set {path}: {split}.idx is damaged ({error}); prepare or copy the data set again"
            ) from error
        if len(self.dataset) != self.manifest["splits"][split]["documents"]:
            raise UserError(
                f"data set {path}: {split}.idx does not belong to dataset.json; prepare or copy the data set again"
            )
        self.orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._lock = threading.Lock()  # a prefetching thread and its owner may read at once
        self.order(0)

    def order(self, epoch: int) -> EpochOrder:
        with self._lock:
            return self._order(0 if self.fixed else epoch)

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self.orders:
            name = f"{self.fingerprint[:20]}-{self.split}-length{self.seq_length}-seed{self.seed}-epoch{epoch}-v{INDEX_VERSION}.npy"
            key = epoch_key(self.seed, self.fingerprint, epoch)
            index = build_once(
                self.cache / name, partial(build_epoch, self.dataset.sequence_lengths, self.seq_length, key)
            )
            if len(index) != 2 * len(self.dataset) + 1 + self.samples:
                raise UserError(
                    f"data.cache: {self.cache / name} does not fit the data set; delete this file, it will be built again"
                )
            self.orders[epoch] = EpochOrder.split(index, len(self.dataset))
            while len(self.orders) > EPOCHS_OPEN:
                self.orders.popitem(last=False)
        return self.orders[epoch]

    def read(self, sample: int, out: np.ndarray) -> None:
        """Fills out [seq_length + 1] with sample number `sample`, counted over all passes."""
        epoch, place = divmod(sample, self.samples)
        filled = 0
        for document, first, count in self.order(epoch).spans(place, self.seq_length):
            out[filled : filled + count] = self.dataset.get(document, offset=first, length=count)
            filled += count


class TokenBlend:
    """Samples of several data sets, mixed by weight. Made by `open_blend`.

    Attributes: vocab_size (without padding), eod_id, manifests (dataset.json of each corpus), seq_length, samples_per_epoch (of each corpus).
    """

    def __init__(self, readers: list[_CorpusReader], weights: list[float]) -> None:
        self._readers = readers
        self._pattern = BlendPattern(weights)
        self.manifests: list[dict[str, Any]] = [reader.manifest for reader in readers]
        self.seq_length: int = readers[0].seq_length
        self.vocab_size: int = self.manifests[0]["vocab_size"]
        self.eod_id: int = self.manifests[0]["eod_id"]
        self.samples_per_epoch: list[int] = [reader.samples for reader in readers]

    def sample(self, index: int) -> np.ndarray:
        """Returns tokens [seq_length + 1], int64, of sample `index` >= 0: inputs are [:-1], targets [1:].

        A pure function of the data sets, weights, seed, seq_length and index. There is no last sample: each pass over a corpus has an order of its own.
        Raises IndexError for a negative index.
        """
        out = np.empty(self.seq_length + 1, dtype=np.int64)
        self._fill(index, out)
        return out

    def batch(self, indices: Iterable[int]) -> torch.Tensor:
        """Returns tokens [n, seq_length + 1], int64, of the samples named. Raises IndexError as `sample` does."""
        wanted = [int(index) for index in indices]
        out = np.empty((len(wanted), self.seq_length + 1), dtype=np.int64)
        for row, index in zip(out, wanted, strict=True):
            self._fill(index, row)
        return torch.from_numpy(out)

    def _fill(self, index: int, out: np.ndarray) -> None:
        corpus, sample = self._pattern.locate(index)
        self._readers[corpus].read(sample, out)


def open_blend(
    corpora: list[Corpus], split: str, seq_length: int, seed: int, cache: Path | None
) -> TokenBlend:
    """Opens a split of one or more data sets for reading by position.

    split "train" takes a new order for every pass, keyed by the seed; other splits keep one order that no seed changes.
    cache: folder for sample indices, shared by all processes; None: `index_cache` beside the first corpus.
    Raises UserError when a data set is missing, damaged, named twice or shorter than a sample, or the tokenizers differ.
    """
    folder = cache if cache is not None else Path(corpora[0].path).absolute().parent / "index_cache"
    readers: list[_CorpusReader] = []
    for corpus in corpora:
        reader = _CorpusReader(corpus.path, split, seq_length, seed, folder)
        for other, earlier in zip(corpora, readers, strict=False):
            if reader.manifest["tokenizer_sha256"] != earlier.manifest["tokenizer_sha256"]:
                raise UserError(
                    f"data.corpora: {other.path} and {corpus.path} were prepared with different tokenizers; prepare both with one"
                )
            if reader.fingerprint == earlier.fingerprint:
                raise UserError(
                    f"data.corpora: {other.path} and {corpus.path} hold the same data; name it once and add up the weights"
                )
        readers.append(reader)
    return TokenBlend(readers, [corpus.weight for corpus in corpora])
