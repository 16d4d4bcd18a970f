"""Training of a SentencePiece model that keeps every text exactly.

Code, indentation, any byte of UTF-8.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from model.errors import UserError
from model.hf.tokenizer.special import SPACE_MARK, SPECIAL
from pretrain.data.tokens.reserved import Reserved

FIXED_PIECES = 3 + 256
"""unk, bos and eos, and one piece for each byte."""
SETTINGS: dict[str, Any] = {
    # Text comes back as it went in: no Unicode normalisation, no spaces added or merged, unknown
    # characters as their bytes.
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    # Indentation is worth pieces of its own; numbers are spelt digit by digit.
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    # Also where the sample has none of them, or as good as none: without a piece for the space mark
    # a space is spelt as the mark's bytes, and comes back as the mark.
    "required_chars": f"\n\t{SPACE_MARK}",
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    # The result depends on the order of sentences and, for unigram, on the number of threads: both
    # are constants.
    "shuffle_input_sentence": False,
    "num_threads": 2,
    "max_sentence_length": 1 << 30,
    "minloglevel": 2,
}


@dataclass(frozen=True)
class SentencePieceTrainer:
    """Its methods are those of `Trainer`."""

    model: str
    """SentencePiece's name for how it cuts text: bpe, unigram."""
    file: str = "tokenizer.model"

    def fixed(self, special: Reserved) -> int:
        """As `Trainer`: begin and end are there in any case."""
        return FIXED_PIECES + len({"mask", "pad"} & set(special.names)) + special.sentinels

    def folder(self, out: Path) -> Path | None:
        """As `Trainer`: one file of any name."""
        return None

    def train(self, texts: Sequence[str], vocab_size: int, special: Reserved, size: int) -> dict[str, bytes]:
        """As `Trainer`."""
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=written,
                model_type=self.model,
                vocab_size=vocab_size,
                **SETTINGS | _names(special),
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"--vocab-size {vocab_size} {_misfit(str(error), size)}") from error
        return {self.file: written.getvalue()}


def _names(special: Reserved) -> dict[str, Any]:
    """SentencePiece's settings for special tokens."""
    settings: dict[str, Any] = {
        SPECIAL[role].spec: name for role, name in special.names.items() if SPECIAL[role].spec
    }
    if "pad" in special.names:
        settings["pad_id"] = 3
    control = [special.names["mask"]] if "mask" in special.names else []
    if control := control + special.sentinel_names:
        settings["control_symbols"] = control
    return settings


def _misfit(reason: str, size: int) -> str:
    """Why a vocabulary does not suit a sample of `size` bytes, after SentencePiece's own words.

    These name options that it has and this command has not.
    """
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        least = f"bytes, marks and the characters of the text take {found[1]} pieces"
        return f"is too small: {least}; use at least that many"
    if found := re.search(r"too high .*<= (\d+)", reason):
        most = f"{size} bytes of text give {found[1]} pieces at most"
        return f"is too large: {most}; use no more, or give more text (INPUT, --max-bytes)"
    return f"does not suit {size} bytes of text: {reason.rpartition('] ')[2].strip() or reason}"
