"""A model of speech asked for the words of recordings: a `Translator` whose sources are files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.errors import UserError
from model.speech import FRAMES_PER_TOKEN
from pretrain.data.speech.audio import check_installed, read_clip
from pretrain.trained.beam import Found, Search
from pretrain.trained.heard import speech_facts
from pretrain.trained.open import SPEECH, Trained, open_trained
from pretrain.trained.translate import CrossedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8
"""Recordings heard at once, where nothing is said."""


class Transcriber(CrossedCheckpoint):
    """A checkpoint, as a `Translator` of recordings."""

    longest = None
    """Recordings that are too long are refused when they are read."""

    def __init__(self, trained: Trained) -> None:
        """Raises UserError as `CrossedCheckpoint` does."""
        super().__init__(trained, SPEECH)
        self.facts = speech_facts(trained)

    def encode(self, text: str) -> np.ndarray:
        """Standardised frames [f, m] of the recording at a path.

        Raises UserError for a file that is none, is too short, or too long for learned positions.
        """
        check_installed()
        try:
            frames = self.facts.frames(read_clip(Path(text)))
        except (ValueError, OSError) as error:
            raise UserError(f"{text}: {error}: name a WAV or FLAC file") from None
        if self.most_tokens is not None and len(frames) > self.most_tokens * FRAMES_PER_TOKEN:
            seconds = self.most_tokens * FRAMES_PER_TOKEN / 100
            raise UserError(
                f"{text}: {len(frames) / 100:.1f} s, and {self.name} hears {seconds:.1f} s: cut it"
            )
        return frames

    def search(self, sources: Sequence[np.ndarray], settings: Search) -> list[list[Found]]:
        """As `Translator`."""
        return self.found(*padded(sources), settings)


def padded(clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Frames [b, f, m] of clips [f_i, m] with zeros behind them, and 1 for true ones [b, f]."""
    import torch

    longest = max(map(len, clips))
    frames = torch.zeros(len(clips), longest, clips[0].shape[1])
    keep = torch.zeros(len(clips), longest, dtype=torch.int64)
    for row, clip in enumerate(clips):
        frames[row, : len(clip)], keep[row, : len(clip)] = torch.from_numpy(clip), 1
    return frames, keep


def open_transcriber(model: Path | str) -> Transcriber:
    """The model of a checkpoint. Raises UserError as `open_trained` and `Transcriber` do."""
    return Transcriber(open_trained(model))
