"""`fathom data prepare --speech`: recordings with their words in, a data set folder out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from model.errors import UserError
from model.folders import whole_folder
from model.speech import FrameMoments
from pretrain.data.manifest import MANIFEST, PAIRED, Manifest, SpeechFacts, SplitName
from pretrain.data.prepare import (
    BATCH_BYTES,
    DATA_SET,
    PrepareProgress,
    check_options,
    manifest_fields,
    nothing,
    tokenizer_notes,
    write_all,
)
from pretrain.data.prepare_pairs import (
    PairOptions,
    check_shares,
    held_out,
    pair_fields,
    sized_pairs,
    sources_and_files,
)
from pretrain.data.reading.pairs import PairFile
from pretrain.data.reading.raw_record import Record
from pretrain.data.speech.audio import check_installed
from pretrain.data.speech.encode import SpeechJob
from pretrain.data.speech.filterbanks import Scale, loaded
from pretrain.data.speech.statistics import MEASURED_CLIPS, MEASURED_FRAMES, FrameSums, frame_moments
from pretrain.data.tokens.encode import EncodedBatch
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.writer import PairOutput

Normalise = Literal["utterance", "global"]
BATCH_CLIPS = 32
"""That one task of a worker holds."""
LIBRARIES = ("scipy", "soundfile")


@dataclass(frozen=True)
class SpeechOptions(PairOptions):
    """The choices of `fathom data prepare --speech`; `sides` are the paths and what is said."""

    filters: int = 80
    max_seconds: float = 30.0
    """Of a clip."""
    normalise: Normalise = "utterance"


class SpeechOutput(PairOutput):
    """Frames and ids of each split, and the statistics of frames."""

    what = "clips"

    def __init__(self, folder: Path, tokenizer: Tokenizer, options: SpeechOptions) -> None:
        super().__init__(folder, tokenizer, options.strict)
        self.filters, self.normalise = options.filters, options.normalise
        self.sums = FrameSums(options.filters)

    def dtype_of(self, name: SplitName) -> type[np.generic]:
        """As `DatasetOutput`."""
        return np.uint16 if name in {frames for frames, _ in PAIRED.values()} else self.tokenizer.dtype

    def add(self, result: EncodedBatch) -> None:
        """As `DatasetOutput`."""
        super().add(result)
        frames = np.frombuffer(result.splits[0].tokens, dtype=np.uint16).reshape(-1, self.filters)
        self.sums.add(loaded(frames))

    def count_sources(self, result: EncodedBatch) -> None:
        """Frames are no tokens."""

    def moments(self) -> FrameMoments:
        """Of some clips of train, as training sees them."""
        lengths = np.concatenate(self.splits[0].lengths)
        ends = np.cumsum(lengths, dtype=np.int64)
        values = np.memmap(self.folder / "train_source.bin", mode="r", dtype=np.uint16)
        places = np.unique(np.linspace(0, len(lengths) - 1, MEASURED_CLIPS).astype(int))
        clips = [values[ends[at] - lengths[at] : ends[at]].reshape(-1, self.filters) for at in places]
        scale = Scale(self.normalise, self.sums.mean, self.sums.std)
        return frame_moments([scale(loaded(clip))[:MEASURED_FRAMES] for clip in clips])


def _sized(files: list[PairFile], options: SpeechOptions) -> Iterator[tuple[Record, int]]:
    """Records, each as large as its share of a batch."""
    for record, _ in sized_pairs(files, options):
        yield record, BATCH_BYTES // BATCH_CLIPS


def prepare_speech(
    options: SpeechOptions,
    on_progress: Callable[[PrepareProgress], None] = nothing,
    on_note: Callable[[str], None] = nothing,
) -> Manifest:
    """Writes the data set folder and returns its manifest, as `prepare_pairs` does for texts.

    Paths of recordings begin at the folder of the file that names them. Clips that are broken,
    silent or too long are left out, counted and named.
    Raises UserError as `prepare_pairs` does, and where libraries that read recordings are missing.
    """
    check_installed()
    split = check_options(options)
    check_shares(options)
    if not options.max_seconds > 0:
        raise UserError(f"--max-seconds {options.max_seconds:g}: must be above 0")
    sources, files = sources_and_files(options)
    held = held_out(options, files, SpeechJob)
    tokenizer = Tokenizer(options.tokenizer)
    for note in tokenizer_notes(tokenizer):
        on_note(note)
    with whole_folder(options.out, DATA_SET, options.overwrite) as folder:
        copy = tokenizer.copy_to(folder)
        job = SpeechJob(
            tokenizer=str(copy),
            sides=options.sides,
            max_tokens=options.max_tokens,
            split=split,
            seed=options.seed,
            held=held,
            marked=options.marked,
            filters=options.filters,
            max_seconds=options.max_seconds,
        )
        output = SpeechOutput(folder, tokenizer, options)
        write_all(_sized(files, options), job, output, options, (None, on_progress))
        output.check_own(options.own_splits)
        written = output.finish()
        speech = SpeechFacts(
            **pair_fields(options, output),
            source_token_correlation=0.0,
            filters=options.filters,
            normalise=options.normalise,
            mean=output.sums.mean,
            std=output.sums.std,
            moments=output.moments(),
            max_seconds=options.max_seconds,
        )
        fields = manifest_fields(options, sources, tokenizer)
        fields["versions"] |= {name: importlib.metadata.version(name) for name in LIBRARIES}
        manifest = Manifest(**fields, **written, speech=speech)
        (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest
