"""What a family says of its models: their stacks, their tables of inputs and their head.

Data alone. Who builds, sizes or trains a model reads it here (`ModelConfig.blueprint`) and does not
ask which family it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

WINDOWS = ("window", "global_every", "global_first", "rotary_base_local")
"""Fields of `ModelConfig` about layers that see a part of the sequence."""


class Mask(Enum):
    """Which positions of its sequence a token attends to."""

    CAUSAL = "its own and those before it"
    BIDIRECTIONAL = "all"


@dataclass(frozen=True)
class Stack:
    """Layers one above the other."""

    name: str
    """The canonical names of its parameters begin with it."""
    mask: Mask
    """Of its self-attention."""
    cross: bool = False
    """Each layer also attends to what the stack before it made."""

    @property
    def sublayers(self) -> int:
        """Of one layer."""
        return 3 if self.cross else 2

    def layer(self, index: int) -> str:
        """The beginning of all canonical names of layer `index`, 0-based."""
        return f"{self.name}.layers.{index}."

    @property
    def final_norm(self) -> str:
        """The canonical name of the norm after the last layer."""
        return f"{self.name}.final_layernorm"

    @property
    def causal(self) -> bool:
        """A token does not see those after it."""
        return self.mask is Mask.CAUSAL


@dataclass(frozen=True)
class Head:
    """What stands between the last layer and the loss, beside the output projection."""

    targets: bool = False
    """It sees the positions that have targets, and no others."""
    pooled: bool = False
    """It sees one vector of a sample (`model.image.pool`)."""
    transform: bool = False
    """A dense layer, the activation and a norm before the output projection, and a bias after it.

    `model.plain_head` leaves them out.
    """


@dataclass(frozen=True)
class Sinusoid:
    """How fixed positions turn: entry i of either half by 10000^(-i / steps) a position."""

    first: int = 0
    """The number of a sequence's first position."""
    slowest_last: bool = False
    """The last entry turns 10000 times slower than the first, as in fairseq; else the one that
    would follow it does, as in Vaswani et al. 2017.
    """

    def steps(self, width: int) -> int:
        """From the fastest entry to one that turns 10000 times slower."""
        return width // 2 - self.slowest_last


PLAIN = Sinusoid()
"""Of Vaswani et al. 2017."""


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    name: str
    """What `model.family` calls it."""
    summary: str
    """In one line."""
    stacks: tuple[Stack, ...]
    """In the order of the stream."""
    head: Head = Head()
    inputs: Literal["tokens", "patches", "frames"] = "tokens"
    """What makes the first stack's stream: a table of words, a linear map of an image's patches, or
    convolutions over the frames of a recording.
    """
    sinusoid: Sinusoid = PLAIN
    """Of fixed positions."""
    positions: tuple[str, ...] = ("learned", "rotary", "none")
    """What `model.position` may be."""
    settings: tuple[str, ...] = ()
    """Fields of `ModelConfig` that only some families read, and this one does."""

    @property
    def crossed(self) -> bool:
        """A stack attends to another one's output."""
        return any(stack.cross for stack in self.stacks)
