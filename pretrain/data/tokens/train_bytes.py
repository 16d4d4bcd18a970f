"""Training of a byte-level BPE tokenizer by the `tokenizers` library: tokenizer.json, as GPT-2's.

Every byte is a piece, so that every text comes back as it was. Words begin with their space, digits
stand alone, and a name in brackets is never one word, so that no text gives a special token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from model.hf.tokenizer.special import SPECIAL, names_mask
from model.hf.tokenizer.tokenizer_json import FILE, SETTINGS
from pretrain.data.tokens.reserved import Reserved

END = "<|endoftext|>"
"""What ends a document, unless `sep` has a name."""


class ByteTrainer:
    """Its methods are those of `Trainer`."""

    file = FILE

    def fixed(self, special: Reserved) -> int:
        """As `Trainer`."""
        return 256 + len(_names(special))

    def folder(self, out: Path) -> Path | None:
        """As `Trainer`: what its special tokens are for stands in a second file."""
        if out.name == FILE:
            return out.parent
        if out.is_file() or (out.suffix and not out.is_dir()):
            raise UserError(
                f"--out {out}: this kind is two files, {FILE} and {SETTINGS}: name a folder, or a file {FILE}"
            )
        return out

    def train(self, texts: Sequence[str], vocab_size: int, special: Reserved, size: int) -> dict[str, bytes]:
        """As `Trainer`."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            # A place to fill takes the spaces before it, because words begin with theirs.
            special_tokens=[
                AddedToken(name, lstrip=names_mask(name), normalized=False, special=True)
                for name in _names(special)
            ],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer, len(texts))
        found = tokenizer.get_vocab_size()
        if found < vocab_size:
            most = f"{size} bytes of text give {found} pieces at most"
            advice = "use no more, or give more text (INPUT, --max-bytes)"
            raise UserError(f"--vocab-size {vocab_size} is too large: {most}; {advice}")
        return {FILE: tokenizer.to_str(pretty=True).encode(), SETTINGS: _settings(special).encode()}


def _names(special: Reserved) -> list[str]:
    """All special tokens, in the order of their ids: the end of a document first."""
    end = special.names.get("sep", END)
    others = [special.names[role] for role in ("cls", "pad", "mask") if role in special.names]
    return [end, *others, *special.sentinel_names]


def _settings(special: Reserved) -> str:
    """tokenizer_config.json, with which transformers reads the folder as it is."""
    end = special.names.get("sep", END)
    roles = {SPECIAL[role].setting: name for role, name in special.names.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        # Documents follow each other with the end mark alone between them.
        "bos_token": special.names.get("cls", end),
        **roles,
        # The text "<|endoftext|>" is text: only code ends a document. "[MASK]" is a place to fill.
        "split_special_tokens": "mask" not in special.names,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(settings, indent=2) + "\n"
