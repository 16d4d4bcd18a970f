"""What a checkpoint of a model of images says of images and classes."""

from __future__ import annotations

from model.records import Record, as_record
from parallel.checkpoint.folders import MANIFEST
from pretrain.trained.open import Trained


class Pictures(Record):
    """Classes by number, mean and standard deviation of each channel of pixels in 0 .. 1."""

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_facts(trained: Trained) -> Pictures:
    """Those of the images that the model was trained on.

    Raises UserError where the checkpoint does not tell.
    """
    source = f"{trained.reader.folder / MANIFEST}, progress.images"
    given = trained.reader.manifest.progress.get("images") or {}
    return as_record(given, Pictures, source, "use another checkpoint")
