"""What a tokenizer is told besides its pieces: marks around a text, padding, special tokens.

A decoder continues a text, an encoder reads one whole, and pairs of texts end with a mark each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.hf.tokenizer.special import Role, settings_of, special_pieces

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer

INPUT_NAMES = ("input_ids", "attention_mask")
"""What a tokenizer hands to a model: our targets read nothing else."""


@dataclass(frozen=True)
class Use:
    """What a tokenizer is for."""

    encoder: bool = False
    """Whether its model reads a text whole, between a first and a last mark."""
    token_types: bool = False
    """Whether its model has a table of token types."""
    pairs: bool = False
    """Whether its model makes a text of another, both of which end with the end mark."""

    @property
    def decoder(self) -> bool:
        """Whether its model continues a text."""
        return not self.encoder and not self.pairs

    @property
    def input_names(self) -> list[str]:
        """What it hands to its model."""
        return [*INPUT_NAMES, *(("token_type_ids",) if self.token_types else ())]


@dataclass(frozen=True)
class Marks:
    """What is said of special tokens."""

    settings: Mapping[str, object]
    """In tokenizer_config.json."""
    ids: Mapping[str, int | None]
    """In config.json."""


def decoder_marks(proto: ModelProto) -> Marks:
    """For a parsed SentencePiece model whose documents end with the end mark alone."""
    trainer = proto.trainer_spec
    return Marks(
        {
            # Training documents follow each other with the end mark alone between them:
            # what a first token is predicted from is that mark,
            # and programs that start a text with "bos" (lm-evaluation-harness does)
            # would otherwise start it with a token that the model has never seen.
            "bos_token": trainer.eos_piece,
            "eos_token": trainer.eos_piece,
            # Never produced from text, because of byte fallback; so padding with it hides no token.
            "pad_token": trainer.unk_piece,
            # Batches are continued from their last token, which must not be padding.
            "padding_side": "left",
            # The text "</s>" is text: only code ends a document.
            "split_special_tokens": True,
        },
        {"bos_token_id": trainer.eos_id, "eos_token_id": trainer.eos_id, "pad_token_id": trainer.unk_id},
    )


def encoder_marks(proto: ModelProto) -> Marks:
    """For a parsed SentencePiece model with tokens for masked language modelling."""
    trainer, pieces = proto.trainer_spec, special_pieces(proto)
    roles: tuple[Role, ...] = ("cls", "sep", "pad", "mask")
    return Marks(
        {
            "pad_token": trainer.unk_piece,
            **settings_of(pieces, roles),
            "padding_side": "right",
            # The text "[MASK]" is a place to fill, as it is for every encoder.
            "split_special_tokens": False,
        },
        {
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": pieces["pad"][1] if "pad" in pieces else trainer.unk_id,
        },
    )


def pair_marks(proto: ModelProto) -> Marks:
    """For a parsed SentencePiece model of pairs: a target is told from the end mark on."""
    trainer, pieces = proto.trainer_spec, special_pieces(proto)
    pad = pieces.get("pad", (trainer.unk_piece, trainer.unk_id))
    return Marks(
        {
            # What a target is told from. Programs that read this class ask for the name.
            "bos_token": trainer.eos_piece,
            "eos_token": trainer.eos_piece,
            "pad_token": pad[0],
            "padding_side": "right",
            # The text "</s>" is text: only code ends a document.
            "split_special_tokens": True,
        },
        {
            "bos_token_id": None,
            "eos_token_id": trainer.eos_id,
            "pad_token_id": pad[1],
            "decoder_start_token_id": trainer.eos_id,
        },
    )


def marks_around(begin: list[tuple[str, int]], end: list[tuple[str, int]]) -> dict[str, Any]:
    """What `TemplateProcessing` is told: marks before and after a text, by names and ids.

    Of two texts the second has no mark before it; after a mark before the first it is of type 1.
    """
    first, last = "".join(f"{name} " for name, _ in begin), "".join(f" {name}" for name, _ in end)
    second = f"$B:1{last}:1" if begin else f"$B{last}"
    return {
        "single": f"{first}$A{last}",
        "pair": f"{first}$A{last} {second}",
        "special_tokens": [*begin, *end],
    }


def add_end(tokenizer: Tokenizer, proto: ModelProto) -> None:
    """Puts the end mark after every text.

    tokenizer: a `tokenizers.Tokenizer` made of `proto`.
    """
    from tokenizers import processors

    end = proto.trainer_spec.eos_piece, proto.trainer_spec.eos_id
    tokenizer.post_processor = processors.TemplateProcessing(**marks_around([], [end]))


def add_marks(tokenizer: Tokenizer, proto: ModelProto) -> None:
    """Puts every text between the marks of a document, and two texts with types 0 and 1.

    The mask token takes spaces before it, because the pieces of words begin with theirs.
    tokenizer: a `tokenizers.Tokenizer` made of `proto`.
    """
    from tokenizers import AddedToken, processors

    pieces = special_pieces(proto)
    if "mask" in pieces:
        mask = AddedToken(pieces["mask"][0], lstrip=True, normalized=False, special=True)
        tokenizer.add_special_tokens([mask])
    if "cls" in pieces and "sep" in pieces:
        marks = marks_around([pieces["cls"]], [pieces["sep"]])
        tokenizer.post_processor = processors.TemplateProcessing(**marks)
