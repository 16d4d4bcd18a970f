"""What a Hugging Face folder says of recordings: how their frames are made."""

from __future__ import annotations

from pathlib import Path

from model.errors import UserError
from model.hf.settings.records import ADVICE, FramesFile
from model.records import read_record

EXTRACTOR, RATE = "Speech2TextFeatureExtractor", 16_000


def speech_facts(processor: Path | None, filters: int) -> dict[str, object]:
    """Filters and normalisation, as a run keeps them; empty without a file.

    processor: preprocessor_config.json, where the folder has one.
    filters: that the model hears.
    Raises UserError for frames that are made in another way than ours.
    """
    if processor is None:
        return {}
    data = read_record(processor, FramesFile, ADVICE)
    if data.feature_extractor_type != EXTRACTOR or data.sampling_rate != RATE:
        raise UserError(
            f"{processor}: frames have to be those of {EXTRACTOR} at {RATE} Hz, and these are of "
            f"{data.feature_extractor_type} at {data.sampling_rate} Hz: this is another kind of input"
        )
    if not (data.do_ceptral_normalize and data.normalize_means and data.normalize_vars):
        raise UserError(
            f"{processor}: each filter has to be normalised over its clip (do_ceptral_normalize, "
            "normalize_means, normalize_vars): this is another kind of input"
        )
    if data.num_mel_bins != filters:
        raise UserError(
            f"{processor}: num_mel_bins={data.num_mel_bins}, and the model hears {filters}: {ADVICE}"
        )
    return {"filters": filters, "normalise": "utterance"}
