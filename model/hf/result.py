"""What an export came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from model.hf.mapping import Target
from model.hf.proof import Proof
from model.hf.tokenizer.convert import TokenIds


@dataclass(frozen=True)
class Export:
    """What was written. dtype_difference: change of the logits by storing weights in `dtype`, in standard deviations of the logits (0 for float32).

    tokenizer: of one made from a SentencePiece model; copied_tokenizer: the folder that another was copied from.
    skipped: targets passed over, with the reason why each is not exact enough.
    """

    path: Path
    architecture: Target
    dtype: str
    proof: Proof
    epsilon: float
    folded: bool
    parameters: int
    files: tuple[str, ...]
    dtype_difference: float = 0.0
    tokenizer: TokenIds | None = None
    copied_tokenizer: Path | None = None
    skipped: tuple[str, ...] = ()
