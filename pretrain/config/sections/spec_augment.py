"""What a user may say about changes of training recordings."""

from __future__ import annotations

from pydantic import Field, model_validator

from model.sections import Strict


class SpecAugment(Strict):
    """Parts of the filterbanks that training does not see (Park et al. 2019).

    What is hidden of a clip is a function of the seed and the number of its sample.
    """

    frequency_masks: int = Field(0, ge=0, le=100, description="Bands of filters that are hidden of a clip.")
    frequency_width: int = Field(
        27,
        ge=1,
        le=1 << 10,
        description="Filters of the widest band; a band has between none and all of them.",
    )
    time_masks: int = Field(0, ge=0, le=100, description="Stretches of frames that are hidden of a clip.")
    time_width: int = Field(100, ge=1, le=1 << 20, description="Frames of the longest stretch.")
    time_share: float = Field(
        1.0, gt=0, le=1, description="Share of a clip's frames that the longest stretch has at most."
    )

    @model_validator(mode="after")
    def _check(self) -> SpecAugment:
        fields = type(self).model_fields
        for masks, read in (
            ("frequency_masks", ("frequency_width",)),
            ("time_masks", ("time_width", "time_share")),
        ):
            for name in () if getattr(self, masks) else read:
                if getattr(self, name) != fields[name].default:
                    raise ValueError(
                        f"spec_augment.{name}={getattr(self, name)} has no effect with "
                        f"spec_augment.{masks}=0: give a number of masks, or remove it"
                    )
        return self
