"""What a worker of `fathom data prepare --speech` does: recordings in, filterbanks and ids out.

Must stay free of torch and Megatron.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.manifest import SPLITS
from pretrain.data.reading.pairs import Sides, pair_of
from pretrain.data.reading.raw_record import Broken, Record
from pretrain.data.speech.audio import TooLongError, read_clip
from pretrain.data.speech.filterbanks import log_mel, stored
from pretrain.data.tokens.encode import EncodedBatch, gathered
from pretrain.data.tokens.encode_pairs import PairEncoder, PairJob, digest_of

UNNAMED = "sound"
"""What a recording without a name is called."""


def path_of(record: Record, name: str) -> Path:
    """The recording that a record names."""
    return Path(record.file).parent / name.strip()


def sound_in(record: Record) -> bytes | None:
    """The recording that a record holds itself: a column of sound of the `datasets` library."""
    source = record.raw[0] if isinstance(record.raw, tuple) else None
    held = source.get("bytes") if isinstance(source, Mapping) else None
    return held if isinstance(held, bytes) else None


@dataclass(frozen=True)
class SpeechJob(PairJob):
    """What every worker needs to know."""

    filters: int = 80
    """Numbers of a frame."""
    max_seconds: float = 30.0
    """Of a clip."""

    @staticmethod
    def pair(record: Record, sides: Sides) -> tuple[str, str] | Broken:
        """As `PairJob`. The source is the name of the recording; one that is held may have none."""
        raw = record.raw
        if isinstance(raw, tuple) and isinstance(raw[0], Mapping):
            name = raw[0].get("path") or (UNNAMED if sound_in(record) else "")
            record = record._replace(raw=(name, *raw[1:]))
        return pair_of(record, sides)

    @staticmethod
    def source(record: Record, text: str) -> bytes:
        """As `PairJob`: a name says which file it is only together with the table it stands in."""
        sound = sound_in(record)
        if sound is not None:
            return hashlib.blake2b(sound, digest_size=8).digest()
        return digest_of(os.path.abspath(path_of(record, text)))

    def encoder(self) -> SpeechEncoder:
        """As `Job`."""
        return SpeechEncoder(self)


class SpeechEncoder(PairEncoder):
    """Turns batches of recordings and their words into filterbanks and tokens."""

    job: SpeechJob

    def encode(self, batch: list[Record], size: int) -> EncodedBatch:
        """Encodes the clips of a batch; order is kept within each split.

        The split of a clip follows from what is said or from its file, so that no sentence is in
        two splits unless files say so.
        """
        result = EncodedBatch(records=len(batch), size=size)
        frames, file_sizes = [], []
        kept: list[tuple[Record, str]] = []
        for record, path, text in self.kept(batch, result):
            clip = self._clip(record, path, result)
            if clip is not None:
                frames.append(clip[0])
                file_sizes.append(clip[1])
                kept.append((record, text))
        targets = self._documents([text for _, text in kept])
        fits = [self._fits(record, b"", ids, result) for (record, _), ids in zip(kept, targets, strict=True)]
        own = [self._split(record, text) for record, text in kept]
        text_sizes = [len(text.encode()) for _, text in kept]
        parts = []
        for split in range(len(SPLITS)):
            chosen = [short and its == split for short, its in zip(fits, own, strict=True)]
            parts.append(gathered(frames, file_sizes, np.dtype(np.uint16).itemsize, chosen))
            parts.append(gathered(targets, text_sizes, len(self._end_mark), chosen))
        result.splits = tuple(parts)
        return result

    def _clip(self, record: Record, name: str, result: EncodedBatch) -> tuple[bytes, int] | None:
        """The stored frames of a recording, and its file's bytes; None where broken."""
        sound = sound_in(record)
        source = path_of(record, name) if sound is None else sound
        try:
            samples = read_clip(source, self.job.max_seconds)
            if not samples.any():
                raise ValueError("silence from begin to end")
            frames = stored(log_mel(samples, self.job.filters))
        except TooLongError as error:
            result.too_long.append(Broken(record.file, record.line, f"{name}: {error}"))
        except (ValueError, OSError) as error:
            result.broken.append(Broken(record.file, record.line, f"{name}: {error}"))
        else:
            return frames.tobytes(), source.stat().st_size if isinstance(source, Path) else len(source)
        return None
