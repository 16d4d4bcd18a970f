"""What a checkpoint of a model of speech says of recordings: how their frames are scaled."""

from __future__ import annotations

from typing import Literal

import numpy as np

from model.errors import UserError
from model.records import Record, as_record
from parallel.checkpoint.folders import MANIFEST
from pretrain.data.speech.filterbanks import Scale, loaded, log_mel, stored
from pretrain.trained.open import Trained


class Heard(Record):
    """Frames of the recordings that the model was trained on."""

    filters: int
    normalise: Literal["utterance", "global"]
    mean: tuple[float, ...] = ()
    """Of each filter over all recordings; read where they are normalised together."""
    std: tuple[float, ...] = ()

    @property
    def scale(self) -> Scale:
        """How training standardised frames."""
        return Scale(self.normalise, self.mean, self.std)

    def frames(self, samples: np.ndarray) -> np.ndarray:
        """[f, m] in fp32 of samples in -1 .. 1 at 16 kHz, as training would read them.

        Raises ValueError for a recording that is shorter than a frame.
        """
        return self.scale(loaded(stored(log_mel(samples, self.filters))))


def speech_facts(trained: Trained) -> Heard:
    """Those of the recordings that the model was trained on.

    Raises UserError where the checkpoint does not tell.
    """
    source = f"{trained.reader.folder / MANIFEST}, progress.speech"
    given = trained.reader.manifest.progress.get("speech")
    if not given:
        raise UserError(
            f"{trained.reader.folder} does not tell how its recordings were made ready: import it "
            "from a folder with preprocessor_config.json, or use another checkpoint"
        )
    return as_record(given, Heard, source, "use another checkpoint")
