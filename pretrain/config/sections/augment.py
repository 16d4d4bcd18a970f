"""What a user may say about changes of training images."""

from __future__ import annotations

from pydantic import Field, model_validator

from model.sections import Strict


class Augment(Strict):
    """Changes of training images, each a function of the seed and the number of the sample."""

    flip: bool = Field(False, description="Turn one half of the images left to right.")
    shift: int = Field(
        0, ge=0, le=1 << 12, description="Move images by up to this many pixels; the edge gets their mean."
    )
    min_area: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Take a part of the prepared image with between this share and all of its area, and "
        "sides of 3:4 to 4:3, as what the model sees; 1: a part of the model's size.",
    )
    mixup: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Train on mixtures of two images with shares drawn from Beta(mixup, mixup); 0: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> Augment:
        if self.shift and self.min_area < 1:
            raise ValueError(
                f"augment.shift={self.shift} has no effect with augment.min_area={self.min_area}, "
                "which moves images already: remove one of them"
            )
        return self
