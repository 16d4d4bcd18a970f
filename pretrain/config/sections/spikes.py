"""Section `train.spikes`: steps that would harm are left out."""

from __future__ import annotations

from pydantic import Field, model_validator

from model.sections import Strict


class SpikeConfig(Strict):
    """When the loss or the gradient's norm of a step is a spike, and what follows."""

    sigma: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Leave a step out whose loss or gradient norm is further above the median of the steps "
        "before it than so many times their usual spread (6 is a good start); null: leave out none.",
    )
    window: int = Field(
        128, ge=8, le=1 << 16, description="Steps whose median counts; half of them must be there."
    )
    limit: int = Field(
        10, ge=1, le=1 << 16, description="Steps in a row that are left out before the run stops."
    )

    @model_validator(mode="after")
    def _check(self) -> SpikeConfig:
        if self.sigma is None:
            for name in ("window", "limit"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(
                        f"train.spikes.{name}={value} has no effect without train.spikes.sigma: "
                        "give that or remove it"
                    )
        return self
