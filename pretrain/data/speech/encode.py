"""What a worker of `fathom data prepare --speech` does: recordings in, filterbanks and ids out.

Must stay free of torch and Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.manifest import SPLITS
from pretrain.data.reading.raw_record import Broken, Record
from pretrain.data.speech.audio import TooLongError, read_clip
from pretrain.data.speech.filterbanks import log_mel, stored
from pretrain.data.tokens.encode import EncodedBatch, gathered, split_of
from pretrain.data.tokens.encode_pairs import PairEncoder, PairJob


@dataclass(frozen=True)
class SpeechJob(PairJob):
    """What every worker needs to know."""

    filters: int = 80
    """Numbers of a frame."""
    max_seconds: float = 30.0
    """Of a clip."""

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
        found: list[tuple[bytes, str, int]] = []
        kept: list[tuple[Record, str]] = []
        for record, path, text in self.kept(batch, result):
            clip = self._clip(record, path, result)
            if clip is not None:
                found.append(clip)
                kept.append((record, text))
        targets = self._documents([text for _, text in kept])
        fits = [self._short(record, ids, result) for (record, _), ids in zip(kept, targets, strict=True)]
        own = [self._split_of(record, text) for record, text in kept]
        text_sizes = [len(text.encode()) for _, text in kept]
        parts = []
        for split in range(len(SPLITS)):
            chosen = [short and its == split for short, its in zip(fits, own, strict=True)]
            frames, sizes = [clip[0] for clip in found], [clip[2] for clip in found]
            parts.append(gathered(frames, sizes, np.dtype(np.uint16).itemsize, chosen))
            parts.append(gathered(targets, text_sizes, len(self._end_mark), chosen))
        result.splits = tuple(parts)
        return result

    def _clip(self, record: Record, name: str, result: EncodedBatch) -> tuple[bytes, str, int] | None:
        """The stored frames of a recording, its path and its file's bytes; None where broken."""
        path = Path(record.file).parent / name.strip()
        try:
            samples = read_clip(path, self.job.max_seconds)
            if not samples.any():
                raise ValueError("silence from begin to end")
            frames = stored(log_mel(samples, self.job.filters))
        except TooLongError as error:
            result.too_long.append(Broken(record.file, record.line, f"{name}: {error}"))
        except (ValueError, OSError) as error:
            result.broken.append(Broken(record.file, record.line, f"{name}: {error}"))
        else:
            return frames.tobytes(), str(path), path.stat().st_size
        return None

    def _short(self, record: Record, ids: bytes, result: EncodedBatch) -> bool:
        tokens = len(ids) // len(self._end_mark)
        if tokens <= self.job.max_tokens:
            return True
        reason = f"{self.job.sides.target!r} has {tokens} tokens, the most is {self.job.max_tokens}"
        result.too_long.append(Broken(record.file, record.line, reason))
        return False

    def _split_of(self, record: Record, text: str) -> int:
        own = self.job.held.files.get(record.file)
        return split_of(text.encode(), self.job.seed, self.job.split) if own is None else own
