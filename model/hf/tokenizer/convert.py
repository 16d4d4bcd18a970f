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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.hf.tokenizer.settings import (
    Marks,
    Use,
    add_end,
    add_marks,
    decoder_marks,
    encoder_marks,
    pair_marks,
)
from model.hf.tokenizer.special import SPACE_MARK

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, Unigram

# Piece types of the SentencePiece model format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
OTHERWISE = (
    "export with --tokenizer FOLDER, a Hugging Face folder whose tokenizer is copied, or --tokenizer none"
)
"""What to do about a tokenizer that has no equal fast one."""


def load_proto(path: Path | str) -> ModelProto:
    """The parsed model file.

    Raises UserError for a missing or unreadable file, or settings that no fast tokenizer has.
    """
    proto = parse(path)
    if problem := no_equal(proto):
        raise UserError(f"tokenizer {path} has no equal fast tokenizer: {problem}; {OTHERWISE}")
    return proto


def parse(path: Path | str) -> ModelProto:
    """The parsed model file. Raises UserError for a missing or unreadable one."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
        if not proto.pieces:  # no bytes at all are a message, too
            raise DecodeError
    except FileNotFoundError:
        raise UserError(f"tokenizer {path} does not exist") from None
    except DecodeError:
        raise UserError(f"tokenizer {path} is not a SentencePiece model") from None
    return proto


def no_equal(proto: ModelProto) -> str:
    """The first setting of a parsed model that no fast tokenizer has; empty where there is none."""
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
    return next((problem for present, problem in problems if present), "")


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

    size: int
    special: Mapping[str, int | None]
    """By their names in config.json."""
    ties: int = 0
    """Fuzz texts with another segmentation of the same score (unigram only)."""


def _marks(proto: ModelProto, use: Use) -> Marks:
    if use.pairs:
        return pair_marks(proto)
    return encoder_marks(proto) if use.encoder else decoder_marks(proto)


def write_tokenizer(
    model_path: Path | str, folder: Path, max_length: int, use: Use | None = None
) -> TokenIds:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model.

    use: what it is for; a decoder where None.
    Raises UserError for a model that has no equal fast tokenizer (see `load_proto`).
    """
    proto, use = load_proto(model_path), use or Use()
    tokenizer = build(proto)
    if use.encoder:
        add_marks(tokenizer, proto)
    if use.pairs:
        add_end(tokenizer, proto)
    tokenizer.save(str(folder / "tokenizer.json"))
    # transformers has no use for the source,
    # but the way back to training, and other programs, have.
    shutil.copyfile(model_path, folder / "tokenizer.model")
    marks = _marks(proto, use)
    settings = {
        # The one name that both transformers 4 and 5 load as "use tokenizer.json as it is".
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": proto.trainer_spec.unk_piece,
        **marks.settings,
        # transformers 4 gives every fast tokenizer token_type_ids unless told otherwise,
        # and its GPT-2 adds word embeddings for them.
        "model_input_names": use.input_names,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return TokenIds(len(proto.pieces), marks.ids)
