"""A SentencePiece model as a fast tokenizer: the same ids and text.

The sentencepiece package is not needed.

Equality is proved, not assumed (`proof.py`).
SentencePiece writes a space as SPACE_MARK, and so would take the mark itself for a space.
Training data spell a mark in the text as its bytes, which the fast tokenizer does by itself,
because its pieces hold real spaces.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, Unigram

SPACE_MARK = "\u2581"
# Piece types of the SentencePiece model format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
OTHERWISE = (
    "export with --tokenizer FOLDER, a Hugging Face folder whose tokenizer is copied, or --tokenizer none"
)
"""What to do about a tokenizer that has no equal fast one."""
INPUT_NAMES = ("input_ids", "attention_mask")
"""What a tokenizer hands to a model: our targets read nothing else."""


def load_proto(path: Path | str) -> ModelProto:
    """The parsed model file.

    Raises UserError for a missing or unreadable file, or settings that no fast tokenizer has.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"tokenizer {path} does not exist") from None
    except DecodeError:
        raise UserError(f"tokenizer {path} is not a SentencePiece model") from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = (
        (trainer.model_type not in (1, 2), "its model type is neither unigram nor bpe"),
        (not trainer.byte_fallback, "it has no byte_fallback"),
        (
            bool(normalizer.precompiled_charsmap),
            f"it normalises text ({normalizer.name}): only the identity keeps text as it is",
        ),
        (normalizer.add_dummy_prefix, "it adds a space before the text (add_dummy_prefix)"),
        (normalizer.remove_extra_whitespaces, "it removes spaces (remove_extra_whitespaces)"),
        (not normalizer.escape_whitespaces, "it does not escape spaces"),
        (trainer.treat_whitespace_as_suffix, "it treats spaces as suffixes"),
        (any(piece.type == UNUSED for piece in proto.pieces), "it has unused pieces"),
        (
            any(piece.type == USER_DEFINED and " " in piece.piece for piece in proto.pieces),
            "it has user-defined pieces with spaces, which SentencePiece never finds in a text",
        ),
    )
    for present, problem in problems:
        if present:
            raise UserError(f"tokenizer {path} has no equal fast tokenizer: {problem}; {OTHERWISE}")
    return proto


def build(proto: ModelProto) -> Tokenizer:
    """A tokenizer with the pieces of a parsed SentencePiece model."""
    from tokenizers import AddedToken, Tokenizer, decoders

    tokenizer = Tokenizer(_bpe(proto) if proto.trainer_spec.model_type == 2 else _unigram(proto))
    if proto.trainer_spec.model_type == 1 and (splits := _split_characters(proto)):
        from tokenizers import Regex, pre_tokenizers

        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{splits}]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [
            AddedToken(p.piece, normalized=False, special=True)
            for p in proto.pieces
            if p.type in (UNKNOWN, CONTROL)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(_text(p), normalized=False, special=False)
            for p in proto.pieces
            if p.type == USER_DEFINED
        ]
    )
    return tokenizer


def _text(piece: ModelProto.SentencePiece) -> str:
    return str(piece.piece).replace(SPACE_MARK, " ")


def _bpe(proto: ModelProto) -> BPE:
    """SentencePiece joins the neighbours whose union has the best score, whatever they are.

    So every split of a piece into two pieces is a merge.
    Among splits of one piece the left-most place in the text wins there, and the first in the list
    here; shorter left parts first agrees with it on runs of one character.
    """
    from tokenizers.models import BPE

    vocabulary = {_text(piece): index for index, piece in enumerate(proto.pieces)}
    plain = {_text(piece) for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece in sorted((p for p in proto.pieces if p.type == NORMAL), key=lambda p: -p.score):
        text = _text(piece)
        merges += [
            (text[:cut], text[cut:])
            for cut in range(1, len(text))
            if text[:cut] in plain and text[cut:] in plain
        ]
    return BPE(vocabulary, merges, unk_token=proto.trainer_spec.unk_piece, fuse_unk=True, byte_fallback=True)


def _unigram(proto: ModelProto) -> Unigram:
    """Pieces with their scores.

    The fast model looks up control and byte pieces in text like any other:
    a low score keeps it from ever choosing "<s>" for the text "<s>".
    """
    from tokenizers.models import Unigram

    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    pieces = [
        (_text(piece), piece.score if piece.type == NORMAL else 20 * lowest - 1000) for piece in proto.pieces
    ]
    return Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=True)


def _split_characters(proto: ModelProto) -> str:
    """Characters of control and byte pieces that no normal piece has.

    Each is unknown wherever it stands, so cutting the text around it changes nothing
    but that "<0x0A>" is no longer found as a byte piece in a vocabulary without "<".
    """
    known = {character for piece in proto.pieces if piece.type == NORMAL for character in _text(piece)}
    special = {
        character
        for piece in proto.pieces
        if piece.type in (UNKNOWN, CONTROL, BYTE)
        for character in piece.piece
    }
    return "".join(f"\\x{{{ord(character):x}}}" for character in sorted(special - known))


@dataclass(frozen=True)
class TokenIds:
    """Special ids of an exported tokenizer, and what its proof found."""

    unk: int
    bos: int
    eos: int
    size: int
    ties: int = 0
    """Fuzz texts with another segmentation of the same score (unigram only)."""


def write_tokenizer(model_path: Path | str, folder: Path, max_length: int) -> TokenIds:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model.

    Raises UserError for a model that has no equal fast tokenizer (see `load_proto`).
    """
    proto = load_proto(model_path)
    build(proto).save(str(folder / "tokenizer.json"))
    # transformers has no use for the source,
    # but the way back to training, and other programs, have.
    shutil.copyfile(model_path, folder / "tokenizer.model")
    trainer = proto.trainer_spec
    settings = {
        # The one name that both transformers 4 and 5 load as "use tokenizer.json as it is".
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Training documents follow each other with the end mark alone between them:
        # what a first token is predicted from is that mark,
        # and programs that start a text with "bos" (lm-evaluation-harness does)
        # would otherwise start it with a token that the model has never seen.
        "bos_token": trainer.eos_piece,
        "eos_token": trainer.eos_piece,
        "unk_token": trainer.unk_piece,
        # Never produced from text, because of byte fallback; so padding with it hides no token.
        "pad_token": trainer.unk_piece,
        # Batches are continued from their last token, which must not be padding.
        "padding_side": "left",
        # transformers 4 gives every fast tokenizer token_type_ids unless told otherwise,
        # and its GPT-2 adds word embeddings for them.
        "model_input_names": list(INPUT_NAMES),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # The text "</s>" is text: only code ends a document.
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return TokenIds(trainer.unk_id, trainer.bos_id, trainer.eos_id, len(proto.pieces))
