"""Tokens that no text contains: what they are for, and what they are called.

One table for tokenizers that are trained, data sets and exports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

SPACE_MARK = "\u2581"
"""How SentencePiece writes a space. A text that holds the character itself needs care."""
CONTROL = 3
"""The type of these pieces in a SentencePiece model."""
Role = Literal["cls", "sep", "pad", "mask"]


@dataclass(frozen=True)
class Special:
    """What one of them is for."""

    name: str
    """By default, after BERT."""
    setting: str
    """Its key in tokenizer_config.json."""
    spec: str
    """The key of its name in SentencePiece's TrainerSpec; empty where that knows no such token."""
    purpose: str


SPECIAL: dict[Role, Special] = {
    "cls": Special("[CLS]", "cls_token", "bos_piece", "begins a document"),
    "sep": Special("[SEP]", "sep_token", "eos_piece", "ends a document"),
    "pad": Special("[PAD]", "pad_token", "pad_piece", "fills a sample up"),
    "mask": Special("[MASK]", "mask_token", "", "hides a token that is to be predicted"),
}
USUAL: dict[Role, tuple[str, ...]] = {
    "cls": ("[CLS]", "<s>", "<bos>", "<|begin_of_text|>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
}
"""What special tokens of a tokenizer.json are called where nothing beside it says so."""
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""The same of what ends a document, the first that there is."""
SENTINEL = "<extra_id_{}>"
"""The name of a sentinel, after T5, by its number: what stands for a hidden span of a text."""
_SENTINEL = re.compile(r"<extra_id_\d+>")
_MASK = re.compile(r"[\[<]\|?mask\|?[\]>]", re.IGNORECASE)


def names_mask(piece: str) -> bool:
    """Whether a control piece of this name is the mask token: its name alone can tell."""
    return _MASK.fullmatch(piece) is not None


def names_sentinel(piece: str) -> bool:
    """Whether a control piece of this name is a sentinel."""
    return _SENTINEL.fullmatch(piece) is not None


def sentinel_ids(proto: ModelProto) -> tuple[int, ...]:
    """Ids of the sentinels of a parsed SentencePiece model, from number 0 on without a gap."""
    control = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type == CONTROL}
    names = takewhile(control.__contains__, map(SENTINEL.format, count()))
    return tuple(control[name] for name in names)


def special_pieces(proto: ModelProto) -> dict[Role, tuple[str, int]]:
    """(piece, id) of the special tokens that a parsed SentencePiece model has."""
    control = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type == CONTROL}
    names: dict[Role, str] = {
        role: getattr(proto.trainer_spec, special.spec) for role, special in SPECIAL.items() if special.spec
    }
    names["mask"] = next(filter(names_mask, control), "")
    return {role: (name, control[name]) for role, name in names.items() if name in control}


def settings_of(pieces: Mapping[Role, tuple[str, int]], roles: Iterable[Role]) -> dict[str, str]:
    """What tokenizer_config.json calls those of `roles` that are there."""
    return {SPECIAL[role].setting: pieces[role][0] for role in roles if role in pieces}
