"""A model of speech asked for the words of recordings: a `Translator` whose sources are files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.errors import UserError
from model.speech import FRAMES_PER_TOKEN
from pretrain.data.speech.audio import check_installed, read_clip
from pretrain.trained.beam import Found, Search, search
from pretrain.trained.heard import speech_facts
from pretrain.trained.open import SPEECH, Trained, open_trained
from pretrain.trained.translate import Read

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8
"""Recordings heard at once, where nothing is said."""


class Transcriber:
    """A checkpoint, as a `Translator`. On a GPU where there is one, in fp32."""

    longest = None
    """Recordings that are too long are refused when they are read."""

    def __init__(self, trained: Trained) -> None:
        """Raises UserError for a model of another kind, without a tokenizer, or not warm yet."""
        import torch

        from model.hf.crossed_reference import CrossedEvaluation
        from pretrain.data.tokens.tokenizer import Tokenizer

        trained.check_kind(SPEECH)
        trained.check_warm()
        self.name = str(trained.reader.folder)
        self.facts = speech_facts(trained)
        self.tokenizer = Tokenizer(trained.needed_tokenizer())
        self.end = self.tokenizer.eod_id
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = {name: weight.to(self.device) for name, weight in trained.weights.items()}
        self.evaluation = CrossedEvaluation(weights, trained.config, logit_scale=trained.logit_scale)
        learned = trained.config.position == "learned"
        self.most_tokens = trained.source_positions if learned else None
        self.longest_new = trained.positions if learned else None
        self.new_tokens = trained.positions

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

    def decode(self, ids: Sequence[int]) -> str:
        """As `Translator`. Ids that the tokenizer does not know are left out."""
        return self.tokenizer.decode(index for index in ids if index < self.tokenizer.vocab_size)

    def search(self, sources: Sequence[np.ndarray], settings: Search) -> list[list[Found]]:
        """As `Translator`."""
        frames, keep = padded(sources)
        return search(Read(self.evaluation, frames, keep, self.device), len(sources), settings, self.end)


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
