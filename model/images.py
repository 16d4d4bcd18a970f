"""A section of a model's configuration: images, their patches, and what is read of them."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field, model_validator

from model.sections import InitConfig, Strict, TransferConfig

PIXELS = 1 << 16
"""Rows or columns of the largest image."""


class ImageConfig(Strict):
    """Images of a model and their patches, which are its tokens."""

    height: int = Field(ge=1, le=PIXELS, description="Rows of an image, in pixels.")
    width: int | None = Field(
        None, ge=1, le=PIXELS, description="Columns of an image; null: as many as rows."
    )
    channels: int = Field(3, ge=1, le=1 << 12, description="Numbers of a pixel: 1 for grey, 3 for colours.")
    patch: int = Field(
        ge=1, le=PIXELS, description="Rows and columns of a patch, which a linear map makes a token of."
    )
    pool: Literal["class_token", "mean"] = Field(
        "class_token",
        description="What the output projection reads: a trained token in front of the patches, or the mean "
        "of all patches, which need no such token.",
    )
    zero_head: bool = Field(
        True,
        description="Start the output projection at zero, so that all classes are equally likely; "
        "false: at logits of variance 1.",
    )
    patch_correlation: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Correlation of two patches of an image, which DeepScaleLM's recursion starts from; "
        "null: that of the data, which `fathom data prepare` measures, or 0 without data.",
    )

    @model_validator(mode="after")
    def _check(self) -> ImageConfig:
        for name, size in (("height", self.height), ("width", self.columns)):
            if size % self.patch:
                raise ValueError(
                    f"model.image.{name}={size} does not divide into patches of {self.patch}: "
                    "change it or model.image.patch"
                )
        return self

    @property
    def columns(self) -> int:
        """Columns of an image."""
        return self.width or self.height

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        return self.channels, self.height, self.columns

    @property
    def grid(self) -> tuple[int, int]:
        """Patches one below the other, and side by side."""
        return self.height // self.patch, self.columns // self.patch

    @property
    def patches(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def class_token(self) -> bool:
        """Whether a token that is no patch stands before them."""
        return self.pool == "class_token"

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.patches + self.class_token

    @property
    def patch_numbers(self) -> int:
        """Numbers of one patch."""
        return self.channels * self.patch**2

    @property
    def both_patches(self) -> float:
        """Share of the pairs of different tokens that are both patches."""
        return (self.patches - 1) / (self.patches + 1) if self.class_token else 1.0


class Pictured(Protocol):
    """What is read of the configuration of a model of images."""

    family: str
    image: ImageConfig | None
    tie_embeddings: bool
    max_position_embeddings: int | None
    hidden_size: int
    init: InitConfig
    transfer: TransferConfig
    position: Literal["learned", "sinusoidal", "rotary", "none"]


def image_problem(model: Pictured) -> str:
    """What a model of images lacks, or what does not act on it; empty if there is nothing."""
    family, init = f"model.family={model.family}", model.init
    if model.image is None:
        return f"{family} needs model.image: the size of images and patches"
    problems = {
        f"{family} has no table of words to use as output projection: set model.tie_embeddings=false": (
            model.tie_embeddings
        ),
        f"model.max_position_embeddings={model.max_position_embeddings} does not fit the "
        f"{model.image.tokens} tokens of model.image: remove it": (
            model.max_position_embeddings not in (None, model.image.tokens)
        ),
        f"model.init.token_correlation={init.token_correlation} has no effect with {family}: "
        "remove it, or set model.image.patch_correlation": init.token_correlation != "zipf",
        f"model.init.mask_token_share={init.mask_token_share} has no effect with {family}, "
        "which has no mask token: remove it": init.mask_token_share is not None,
        f"model.transfer.method={model.transfer.method} has no rule for patches and does not combine "
        f"with {family}: set it to none": model.transfer.method != "none",
        "model.position=sinusoidal of images needs a model.hidden_size that 4 divides, got "
        f"{model.hidden_size}": model.position == "sinusoidal" and model.hidden_size % 4 != 0,
    }
    return next((problem for problem, present in problems.items() if present), "")
