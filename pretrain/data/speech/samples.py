"""Rows of clips for transcription and speech translation: of a blend, by position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from model.errors import UserError
from model.speech import FRAMES_PER_TOKEN, GAP, tokens_of
from pretrain.config.schema import Corpus
from pretrain.config.sections.spec_augment import SpecAugment
from pretrain.data.blend import agree_on_tokens
from pretrain.data.images.augment import Draws
from pretrain.data.index_cache import cache_folder
from pretrain.data.manifest import Manifest, SpeechFacts
from pretrain.data.pairs.samples import PairBlend, PairReader, row_of
from pretrain.data.speech.augment import hide
from pretrain.data.speech.filterbanks import Scale, loaded


class ClipReader(PairReader):
    """The rows of one split of one data set of speech, pass after pass."""

    what = "clips"
    wanted = (
        "speech, which a model of model.family=speech reads: prepare it with `fathom data prepare --speech`"
    )

    def __init__(self, *given: object) -> None:
        """As `PairReader`."""
        super().__init__(*given)  # type: ignore[arg-type]
        facts = self.manifest.speech
        assert facts is not None
        self.filters = facts.filters
        self.scale = Scale(facts.normalise, facts.mean, facts.std)
        own = facts.normalise == "utterance"
        self.normalised = () if own else (facts.mean, facts.std)
        """By what of all clips; nothing where each has its own."""

    @staticmethod
    def facts_of(manifest: Manifest) -> SpeechFacts | None:
        """As `PairReader`."""
        return manifest.speech

    def name_of(self, split: str) -> str:
        """As `PairReader`: how frames are scaled is part of what a model sees."""
        facts = self.manifest.speech
        assert facts is not None
        seen = f"{super().name_of(split)}/{facts.filters}/{facts.normalise}"
        return hashlib.sha256(seen.encode()).hexdigest()

    def side_lengths(self) -> np.ndarray:
        """As `PairReader`: of a source the tokens that are made of its frames, and a gap."""
        facts = self.manifest.speech
        assert facts is not None
        frames, targets = (dataset.sequence_lengths.astype(np.int64) for dataset in self.datasets)
        tokens = -(-(frames // facts.filters) // FRAMES_PER_TOKEN) + GAP
        return np.stack((tokens, targets), axis=1)

    def clips(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(standardised frames [f, m], ids that end with the end mark) of the clips of a row."""
        return [
            (self.scale(loaded(stored.reshape(-1, self.filters))), ids.astype(np.int64))
            for stored, ids in self.pairs(row)
        ]


class ClipBlend(PairBlend):
    """Rows of clips of several data sets, mixed by weight. Made by `open_clips`."""

    def __init__(
        self, readers: list[ClipReader], weights: list[float], padding: int, seed: int, augment: SpecAugment
    ) -> None:
        """augment: what is hidden; seed: of it."""
        super().__init__(list(readers), weights, padding)
        self._clips, self.filters = readers, readers[0].filters
        self.seed, self.augment = seed, augment

    def batch(self, indices: Iterable[int]) -> dict[str, torch.Tensor]:
        """Returns the rows named, n of them, a pure function of their numbers.

        frames [n, 4 s_e, m] in fp32, standardised, zeros outside of clips; frame_documents
        [n, 4 s_e]: numbers of clips from 1, 0 for what is none. All else as `PairBlend.batch`.
        """
        rows = []
        for index in map(int, indices):
            clips, draws = self.clips_of(index), Draws(self.seed, index)
            for frames, _ in clips:
                hide(frames, self.augment, draws)
            lengths = self.source_length, self.seq_length
            rows.append(clip_row(clips, lengths, self.eod_id, self.padding))
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}

    def clips_of(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `ClipReader.clips`, of a row of the blend. Raises as `PairBlend.pairs_of`."""
        corpus, sample = self._pattern.locate(index)
        reader = self._clips[corpus]
        clips = reader.clips(reader.row(sample))
        for _, ids in clips:
            self.check_ids(ids, reader, index)
        return clips

    def check_filters(self, filters: int) -> None:
        """Raises UserError where a model of so many filters cannot hear the frames."""
        if self.filters != filters:
            raise UserError(
                f"data set {self._clips[0].path}: its frames have {self.filters} filters, "
                f"model.speech.filters={filters}: change it, or prepare them with --filters"
            )

    def heard_as(self, scale: Scale) -> None:
        """Has frames standardised by another scale than the data sets': a trained model's."""
        for reader in self._clips:
            reader.scale = scale

    def blank(self, count: int) -> dict[str, torch.Tensor]:
        """As `PairBlend.blank`."""
        batch = super().blank(count)
        del batch["source"], batch["source_documents"]
        places = FRAMES_PER_TOKEN * self.source_length
        return batch | {
            "frames": torch.zeros(count, places, self.filters),
            "frame_documents": torch.zeros(count, places, dtype=torch.int64),
        }


def clip_row(
    clips: Sequence[tuple[np.ndarray, np.ndarray]], lengths: tuple[int, int], end: int, padding: int
) -> dict[str, np.ndarray]:
    """One row of `ClipBlend.batch`, of clips that fit.

    clips: (standardised frames [f, m], ids that end with the end mark).
    lengths: tokens of the row's two sides.
    """
    heard = [np.zeros(tokens_of(len(frames)), dtype=np.int64) for frames, _ in clips]
    row = row_of([(no, ids) for no, (_, ids) in zip(heard, clips, strict=True)], lengths, end, padding)
    for name in ("source", "source_documents"):
        del row[name]
    places = FRAMES_PER_TOKEN * lengths[0]
    row["frames"] = np.zeros((places, clips[0][0].shape[1]), dtype=np.float32)
    row["frame_documents"] = np.zeros(places, dtype=np.int64)
    row["source_positions"] = np.zeros(lengths[0], dtype=np.int64)
    first = 0
    for number, (frames, _) in enumerate(clips, start=1):
        tokens, begin = tokens_of(len(frames)), FRAMES_PER_TOKEN * first
        row["frames"][begin : begin + len(frames)] = frames
        row["frame_documents"][begin : begin + len(frames)] = number
        row["source_positions"][first : first + tokens] = np.arange(tokens)
        first += tokens + GAP
    return row


def open_clips(
    corpora: list[Corpus],
    split: str,
    lengths: tuple[int, int],
    seed: int,
    cache: Path | None,
    augment: SpecAugment,
    alone: bool = False,
) -> ClipBlend:
    """Opens a split of one or more data sets of speech for reading by position.

    lengths: tokens of a row's two sides. augment: of the training split; others are shown as they
    are. The other arguments are those of `open_blend`.
    Raises UserError as that does, for a data set that holds no speech, and for different filters or
    normalisation.
    """
    folder = cache_folder(cache, corpora[0].path)
    readers: list[ClipReader] = []
    for corpus in corpora:
        reader = ClipReader(corpus.path, split, lengths, seed, folder, alone)
        agree_on_tokens(readers, reader)
        if readers and reader.filters != readers[0].filters:
            raise UserError(
                f"data.corpora: {readers[0].path} has {readers[0].filters} filters and {reader.path} "
                f"{reader.filters}: prepare both with the same --filters"
            )
        if readers and reader.normalised != readers[0].normalised:
            raise UserError(
                f"data.corpora: frames of {readers[0].path} and {reader.path} are not normalised alike: "
                "prepare both with --normalise utterance, or both together"
            )
        readers.append(reader)
    manifest = readers[0].manifest
    padding = manifest.special.get("pad", manifest.eod_id)
    weights = [corpus.weight for corpus in corpora]
    return ClipBlend(readers, weights, padding, seed, augment if split == "train" else SpecAugment())
