"""A section of a model's configuration: filterbanks of speech, and how tokens are made of them."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from model.sections import InitConfig, Strict

KERNEL, STRIDE = 5, 2
"""Of both convolutions over frames, as in Speech2Text (Wang et al. 2020)."""
FRAMES_PER_TOKEN = STRIDE * STRIDE
GAP = 1
"""Tokens that stay empty after each clip of a row, so that no window reaches into the next one."""


class FrameMoments(Strict):
    """Mean squares inside convolutions with weights of variance 1 / fan-in, of unit frames."""

    entering: float = Field(
        gt=0,
        le=1e6,
        description="Of the first convolution's pre-activations; below 1, as windows at the ends of a clip "
        "hold zeros.",
    )
    middle: float = Field(
        gt=0,
        le=1e6,
        description="Of the second one's, where the first gate has pre-activations of mean square 1.",
    )
    leaving: float = Field(
        gt=0, le=1e6, description="Of what the second gate gives for pre-activations of mean square 1."
    )
    correlation: float = Field(ge=0, lt=1, description="Of two tokens of a clip there.")


NO_DATA = FrameMoments(entering=1.0, middle=0.2934, leaving=0.2934, correlation=0.0)
"""Of frames that have nothing in common: E[sigmoid(x)^2] is 0.2934 for x of variance 1."""


class SpeechConfig(Strict):
    """Filterbanks that an encoder reads, and the convolutions that make a token of four frames."""

    filters: int = Field(80, ge=1, le=1 << 10, description="Numbers of a frame, which cover 10 ms.")
    channels: int = Field(
        1024,
        ge=2,
        le=1 << 20,
        multiple_of=2,
        description="Channels of the first convolution; its gate leaves half of them.",
    )
    moments: FrameMoments | None = Field(
        None,
        description="Mean squares and correlation of tokens that initial weights follow from; "
        "null: those of the data, which `fathom data prepare` measures.",
    )

    @property
    def known_moments(self) -> FrameMoments:
        """What initial weights follow from."""
        return self.moments or NO_DATA

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers that enter a window's place: of the first convolution, of the second."""
        return self.filters, self.channels // 2


def tokens_of(frames: int) -> int:
    """How many tokens the convolutions make of so many frames."""
    return -(-frames // FRAMES_PER_TOKEN)


class Spoken(Protocol):
    """What is read of the configuration of a model of speech."""

    family: str
    speech: SpeechConfig | None
    position: Literal["learned", "sinusoidal", "rotary", "none"]
    hidden_size: int
    init: InitConfig


def speech_problem(model: Spoken) -> str:
    """What a model of speech lacks, or what does not act on it; empty if there is nothing."""
    family = f"model.family={model.family}"
    if model.speech is None:
        return f"{family} needs model.speech: the filters of a frame and the channels of its convolutions"
    if model.position == "sinusoidal" and model.hidden_size < 4:
        return f"model.position=sinusoidal needs a model.hidden_size of 4 at least, got {model.hidden_size}"
    return ""
