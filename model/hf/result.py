"""What an export came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.hf.names.conversions import Target
from model.hf.proof import Proof
from model.hf.tokenizer.convert import TokenIds


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written."""

    path: Path
    architecture: Target
    dtype: str
    proof: Proof
    epsilon: float
    """Of all norms."""
    folded: bool
    """Whether the scheme's constants went into the weights."""
    parameters: int
    files: tuple[str, ...]
    dtype_difference: float = 0.0
    """Change of the logits by storing weights in `dtype`, in their standard deviations.

    0 for float32.
    """
    tokenizer: TokenIds | None = None
    """Of one made from a SentencePiece model."""
    copied_tokenizer: Path | None = None
    """The folder that another one was copied from."""
    skipped: tuple[str, ...] = ()
    """Targets passed over, with the reason why each is not exact enough."""
