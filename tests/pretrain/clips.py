"""Small recordings whose words are tones, and data sets of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.manifest import Manifest
from pretrain.data.reading.pairs import Sides
from pretrain.data.speech.filterbanks import RATE
from pretrain.data.speech.prepare import SpeechOptions, prepare_speech
from pretrain.data.tokens.train import Reading, special_names, train_tokenizer

WORDS = {"red": 300.0, "blue": 500.0, "green": 800.0, "black": 1300.0, "white": 2100.0, "grey": 3400.0}
FRENCH = {"red": "rouge", "blue": "bleu", "green": "vert", "black": "noir", "white": "blanc", "grey": "gris"}
SIDES = Sides("path", "transcript")


def spoken(words: list[str], seed: int = 0) -> np.ndarray:
    """Samples in -1 .. 1 at 16 kHz: for every word a tone of 0.12 s, and some noise."""
    time = np.arange(int(0.12 * RATE)) / RATE
    fade = np.hanning(len(time))
    tones = np.concatenate([fade * np.sin(2 * np.pi * WORDS[word] * time) for word in words])
    return (0.4 * tones + 1e-3 * np.random.default_rng(seed).standard_normal(len(tones))).astype(np.float32)


def write_clip(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    """As WAV or FLAC, by the suffix."""
    soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed (the extra `speech`)")
    soundfile.write(path, samples, rate)


def write_clips(folder: Path, count: int) -> Path:
    """FOLDER/clips.jsonl, and a clip of one to four words for each line. Returns its path."""
    draw, lines = random.Random(0), []
    for number in range(count):
        words = [draw.choice(list(WORDS)) for _ in range(draw.randint(1, 4))]
        write_clip(folder / f"{number}.wav", spoken(words, number))
        lines.append(
            {
                "path": f"{number}.wav",
                "transcript": " ".join(words),
                "translation": " ".join(FRENCH[word] for word in words),
            }
        )
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def write_speech(folder: Path, count: int = 60, sides: Sides = SIDES, filters: int = 20) -> Manifest:
    """FOLDER/data with half of the clips for validation, and FOLDER/words.model."""
    clips, tokenizer = write_clips(folder, count), folder / "words.model"
    reading = Reading(sides=Sides("transcript", "translation"))
    train_tokenizer([str(clips)], tokenizer, vocab_size=300, special=special_names("pad"), reading=reading)
    options = SpeechOptions(
        [str(clips)], folder / "data", tokenizer, (0.7, 0.3, 0), workers=1, sides=sides, filters=filters
    )
    return prepare_speech(options)
