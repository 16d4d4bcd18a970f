"""A model of speech asked for the words of recordings: a `Translator` whose sources are files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.errors import UserError
from model.speech import FRAMES_PER_TOKEN
from pretrain.data.speech.audio import TooLongError, check_installed, read_clip
from pretrain.data.speech.filterbanks import seconds_of
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
        """Raises UserError as `CrossedCheckpoint` does, and where no recording can be read."""
        check_installed()
        super().__init__(trained, SPEECH)
        self.facts = speech_facts(trained)
        self.seconds = None if self.most_tokens is None else seconds_of(FRAMES_PER_TOKEN * self.most_tokens)
        """Of the longest recording."""

    def encode(self, text: str) -> np.ndarray:
        """Standardised frames [f, m] of the recording at a path.

        Raises UserError for a file that is none, is too short, or too long for learned positions.
        """
        try:
            return self.facts.frames(read_clip(Path(text), self.seconds))
        except TooLongError as error:
            raise UserError(f"{text}: {error} with the positions of {self.name}: cut it") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{text}: {error}: name a WAV or FLAC file") from None

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
