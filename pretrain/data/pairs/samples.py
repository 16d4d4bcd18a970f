"""Rows of pairs for translation: of a blend, by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.blend import Blend, agree_on_tokens
from pretrain.data.index_cache import build_once, cache_folder
from pretrain.data.indexed import IndexedDataset
from pretrain.data.manifest import Manifest, PairFacts, load_manifest, pair_fingerprint
from pretrain.data.pairs.packing import PACKING_VERSION, Packing, pack
from pretrain.data.passes import Passes
from pretrain.data.token_files import check_start, damaged, split_prefix

MUCH_PADDING = 0.1
"""From this share on a side's length is worth changing."""


class PairReader:
    """The rows of one split of one data set of pairs, pass after pass."""

    what = "pairs"
    wanted = "pairs, which train.task=translation reads: prepare it with `fathom data prepare --pairs`"
    """What is needed where a data set holds something else."""

    def __init__(
        self, path: str, split: str, lengths: tuple[int, int], seed: int, cache: Path, alone: bool
    ) -> None:
        """lengths: of a row's source and target side."""
        self.path, self.split, self.lengths = path, split, lengths
        self.cache, self.alone = cache, alone
        self.manifest = load_manifest(path)
        if self.facts_of(self.manifest) is None:
            raise UserError(f"data set {path} holds no {self.wanted}")
        sides = self.manifest.sides(path, split)
        off = "" if split == "train" else ", or set train.eval_samples=0"
        if not self.manifest.splits[sides[0]].documents:
            raise UserError(
                f"data set {path}: the {split} split has no {self.what}; prepare more, "
                f"or a larger share of it (--split){off}"
            )
        prefixes = [split_prefix(path, side, self.manifest) for side in sides]
        for side in sides:
            check_start(path, side, self.manifest)
        self.fingerprint = self.name_of(split)
        try:
            self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        except Exception as error:  # whatever the reader meets in a file that was overwritten
            raise damaged(path, split, error) from error
        self.packing = self._packing()
        self.samples = self.packing.rows
        if not self.samples:
            raise UserError(
                f"data set {path}: no pair of the {split} split fits data.source_length={lengths[0]} and "
                f"data.seq_length={lengths[1]}; raise them, or prepare more data{off}"
            )
        self.passes = Passes(self.samples, seed if split == "train" else None, self.fingerprint)
        # A pass, and the tokens of targets before each of its rows, [R + 1].
        self._counted: tuple[int, np.ndarray] | None = None

    @staticmethod
    def facts_of(manifest: Manifest) -> PairFacts | None:
        """What a data set of this kind says; None of another kind."""
        return manifest.pairs

    def name_of(self, split: str) -> str:
        """Of what the model sees of a split, the same wherever the data set lies."""
        return pair_fingerprint(self.manifest, split)

    def side_lengths(self) -> np.ndarray:
        """Places that each pair takes on the two sides of a row, int64 [P, 2]."""
        lengths = [dataset.sequence_lengths for dataset in self.datasets]
        return np.stack(lengths, axis=1).astype(np.int64)

    def _packing(self) -> Packing:
        both = self.side_lengths()
        name = f"{self.fingerprint[:20]}-{self.split}-pairs{self.lengths[0]}x{self.lengths[1]}"
        path = self.cache / f"{name}-v{PACKING_VERSION}.npy"
        rows = build_once(path, lambda: pack(both, *self.lengths), len(both), self.alone)
        return Packing.of(rows, both)

    def row(self, sample: int) -> int:
        """The row of sample number `sample`, counted over all passes."""
        return self.passes.locate(sample)

    def targets_before(self, sample: int) -> int:
        """How many tokens the targets of the first `sample` samples have."""
        epoch, place = divmod(sample, self.samples)
        if self._counted is None or self._counted[0] != epoch:
            sums = np.zeros(self.samples + 1, dtype=np.int64)
            np.cumsum(self.packing.targets[self.passes.order(epoch)], out=sums[1:])
            self._counted = epoch, sums
        sums = self._counted[1]
        return epoch * int(sums[-1]) + int(sums[place])

    def pairs(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(source, target) of the pairs of a row, ids that end with the end mark."""
        first, stop = self.packing.starts[row : row + 2]
        sources, targets = self.datasets
        try:
            return [(sources.get(pair), targets.get(pair)) for pair in self.packing.pairs[first:stop]]
        except (ValueError, IndexError) as error:
            raise damaged(self.path, self.split, error) from error

    @property
    def padding_share(self) -> float:
        """Share of both sides of all rows that holds no token."""
        used = self.packing.sources.sum() + self.packing.targets.sum()
        return float(1 - used / (self.samples * sum(self.lengths)))

    def report(self) -> str:
        """How full the rows are, in a line."""
        packing, (source, target) = self.packing, self.lengths
        padding, whole = packing.padding(source, target), self.padding_share
        text = (
            f"{self.path}: {len(packing.pairs)} pairs in {packing.rows} rows of {source} + {target} tokens, "
            f"{len(packing.pairs) / packing.rows:.1f} a row; padding {whole:.1%} (source {padding[0]:.1%}, "
            f"target {padding[1]:.1%})"
        )
        if packing.left_out:
            text += f"; {packing.left_out} pairs are longer than a row and left out"
        if whole > MUCH_PADDING:
            ratio = packing.sources.sum() / packing.targets.sum()
            text += f"; sources have {ratio:.2f} tokens for each of a target: change data.source_length"
        return text


class PairBlend(Blend):
    """Rows of pairs of several data sets, mixed by weight. Made by `open_pairs`."""

    def __init__(self, readers: list[PairReader], weights: list[float], padding: int) -> None:
        super().__init__(readers, weights)
        self._pairs = readers
        self.padding = padding
        self.source_length, self.seq_length = readers[0].lengths

    @property
    def left_out(self) -> int:
        """Pairs that are longer than a row."""
        return sum(reader.packing.left_out for reader in self._pairs)

    @property
    def padding_share(self) -> float:
        """As `PairReader.padding_share`, of a sample of the blend."""
        shares = np.array(self.weights) / sum(self.weights)
        return float(shares @ [reader.padding_share for reader in self._pairs])

    def tokens_before(self, sample: int) -> int:
        """How many tokens the targets of the first `sample` samples have, their end marks included.

        Sources and padding do not count.
        """
        taken = self._pattern.taken(sample)
        return sum(reader.targets_before(count) for reader, count in zip(self._pairs, taken, strict=True))

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Returns the rows named, n of them, a pure function of their numbers.

        source [n, s_e], tokens [n, s_d]: what encoder and decoder read; the latter is the end mark
        and the target. labels [n, s_d]: the target and the end mark. weights [n, s_d] in fp32: 1,
        or 0 for padding. source_documents, documents: numbers of pairs from 1, 0 for padding.
        source_positions, positions: in the pair.
        Raises IndexError for a negative number, UserError for damaged data.
        """
        rows = [self._row(int(index)) for index in indices]
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def _row(self, index: int) -> dict[str, np.ndarray]:
        pairs = self.pairs_of(index)
        return row_of(pairs, (self.source_length, self.seq_length), self.eod_id, self.padding)

    def pairs_of(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(source, target) of the pairs of a row, int64 ids that end with the end mark.

        Raises IndexError for a negative number, UserError for damaged data.
        """
        corpus, sample = self._pattern.locate(index)
        reader = self._pairs[corpus]
        pairs = [
            (source.astype(np.int64), target.astype(np.int64))
            for source, target in reader.pairs(reader.row(sample))
        ]
        for pair in pairs:
            for ids in pair:
                self.check_ids(ids, reader, index)
        return pairs

    def check_ids(self, ids: np.ndarray, reader: PairReader, index: int) -> None:
        """Raises UserError for ids, int64, beyond the vocabulary."""
        if int(ids.view(np.uint64).max()) >= self.vocab_size:
            raise damaged(reader.path, reader.split, f"a token beyond the vocabulary, in sample {index}")

    def targets(self, indices: Iterable[int]) -> int:
        """Returns how many labels of these rows count. Reads no tokens."""
        found = 0
        for index in indices:
            corpus, sample = self._pattern.locate(int(index))
            reader = self._pairs[corpus]
            found += int(reader.packing.targets[reader.row(sample)])
        return found

    def report(self) -> list[str]:
        """How full the rows of each data set are, a line each."""
        return [reader.report() for reader in self._pairs]

    def blank(self, count: int) -> dict[str, torch.Tensor]:
        """Returns a batch of `count` rows of the same form, without data and weights."""
        shapes = {"source": self.source_length, "tokens": self.seq_length}
        names = {
            "source": ("source", "source_documents", "source_positions"),
            "tokens": ("tokens", "labels", "documents", "positions"),
        }
        batch = {
            name: torch.zeros(count, length, dtype=torch.int64)
            for side, length in shapes.items()
            for name in names[side]
        }
        return batch | {"weights": torch.zeros(count, self.seq_length)}


def row_of(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], lengths: tuple[int, int], end: int, padding: int
) -> dict[str, np.ndarray]:
    """One row of `PairBlend.batch`, of pairs that fit.

    pairs: (source, target), ids that end with the end mark. lengths: of the row's two sides.
    """
    sources, labels = [source for source, _ in pairs], [target for _, target in pairs]
    shifted = [np.concatenate([np.array([end]), label[:-1]]) for label in labels]
    places = _places(sources, lengths[0]), _places(labels, lengths[1])
    return {
        "source": _filled(sources, lengths[0], padding),
        "tokens": _filled(shifted, lengths[1], padding),
        "labels": _filled(labels, lengths[1], padding),
        "weights": (places[1][0] > 0).astype(np.float32),
        "source_documents": places[0][0],
        "documents": places[1][0],
        "source_positions": places[0][1],
        "positions": places[1][1],
    }


def _places(texts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of pairs and positions in them, [length] each."""
    numbers = [np.full(len(text), number) for number, text in enumerate(texts, start=1)]
    return _filled(numbers, length, 0), _filled([np.arange(len(text)) for text in texts], length, 0)


def _filled(parts: list[np.ndarray], length: int, padding: int) -> np.ndarray:
    """Parts one after another and padding, int64 [length]."""
    out = np.full(length, padding, dtype=np.int64)
    joined = np.concatenate(parts)
    out[: len(joined)] = joined
    return out


def open_pairs(
    corpora: list[Corpus],
    split: str,
    lengths: tuple[int, int],
    seed: int,
    cache: Path | None,
    alone: bool = False,
) -> PairBlend:
    """Opens a split of one or more data sets of pairs for reading by position.

    lengths: of a row's source and target side. The other arguments are those of `open_blend`.
    Raises UserError as that does, and for a data set that holds no pairs.
    """
    folder = cache_folder(cache, corpora[0].path)
    readers: list[PairReader] = []
    for corpus in corpora:
        reader = PairReader(corpus.path, split, lengths, seed, folder, alone)
        agree_on_tokens(readers, reader)
        readers.append(reader)
    manifest = readers[0].manifest
    padding = manifest.special.get("pad", manifest.eod_id)
    return PairBlend(readers, [corpus.weight for corpus in corpora], padding)
