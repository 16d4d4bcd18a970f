"""A SentencePiece model as a fast tokenizer: the same ids and the same text, without the sentencepiece package. Equality is proved, not assumed.

SentencePiece writes a space as SPACE_MARK, and so would take the mark itself for a space. Training data spell a mark in the text as its bytes, which is
what `reference_ids` does and what the fast tokenizer does by itself, because its pieces hold real spaces.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.hf.configs import SPECIAL
from model.records import read_json

SPACE_MARK = "\u2581"
# Piece types of the SentencePiece model format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def load_proto(path: Path | str) -> Any:
    """The parsed model file. Raises UserError for a missing or unreadable file, or settings that a fast tokenizer cannot reproduce."""
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
    )
    for present, problem in problems:
        if present:
            raise UserError(
                f"tokenizer {path} has no equal fast tokenizer: {problem}; export with --tokenizer FOLDER, a Hugging Face folder whose tokenizer is copied, "
                "or --tokenizer none"
            )
    return proto


def build(proto: Any) -> Any:
    """A `tokenizers.Tokenizer` with the pieces of a parsed SentencePiece model."""
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


def _text(piece: Any) -> str:
    return str(piece.piece).replace(SPACE_MARK, " ")


def _bpe(proto: Any) -> Any:
    """SentencePiece joins the neighbours whose union has the best score, whatever they are: every split of a piece into two pieces is a merge.

    Among splits of one piece the left-most place in the text wins there, and the first in the list here; shorter left parts first agrees with it on
    runs of one character.
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


def _unigram(proto: Any) -> Any:
    """The fast model looks up control and byte pieces in text like any other: a low score keeps it from ever choosing "<s>" for the text "<s>"."""
    from tokenizers.models import Unigram

    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    pieces = [
        (_text(piece), piece.score if piece.type == NORMAL else 20 * lowest - 1000) for piece in proto.pieces
    ]
    return Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=True)


def _split_characters(proto: Any) -> str:
    """Characters of control and byte pieces that no normal piece has. Each is unknown wherever it stands, so cutting the text around it changes
    nothing but that "<0x0A>" is no longer found as a byte piece in a vocabulary without "<"."""
    known = {character for piece in proto.pieces if piece.type == NORMAL for character in _text(piece)}
    special = {
        character
        for piece in proto.pieces
        if piece.type in (UNKNOWN, CONTROL, BYTE)
        for character in piece.piece
    }
    return "".join(f"\\x{{{ord(character):x}}}" for character in sorted(special - known))


INPUT_NAMES = ("input_ids", "attention_mask")
"""What a tokenizer hands to a model: our targets read nothing else."""
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files of which tokenizers of Hugging Face folders consist."""


@dataclass(frozen=True)
class TokenIds:
    """Special ids of an exported tokenizer. ties: fuzz texts with another segmentation of the same score (unigram only)."""

    unk: int
    bos: int
    eos: int
    size: int
    ties: int = 0


def write_tokenizer(model_path: Path | str, folder: Path, max_length: int) -> TokenIds:
    """Writes tokenizer.json, tokenizer_config.json and tokenizer.model. Raises UserError for a model that has no equal fast tokenizer (see `load_proto`)."""
    proto = load_proto(model_path)
    build(proto).save(str(folder / "tokenizer.json"))
    # transformers has no use for the source, but the way back to training, and other programs, have.
    shutil.copyfile(model_path, folder / "tokenizer.model")
    trainer = proto.trainer_spec
    settings = {
        # The one name that both transformers 4 and 5 load as "use tokenizer.json as it is".
        "tokenizer_class": "PreTrainedTokenizerFast",
        # Training documents follow each other with the end mark alone between them: what a first token is predicted from is that mark, and programs
        # that start a text with "bos" (lm-evaluation-harness does) would otherwise start it with a token that the model has never seen.
        "bos_token": trainer.eos_piece,
        "eos_token": trainer.eos_piece,
        "unk_token": trainer.unk_piece,
        # Never produced from text, because of byte fallback; so padding with it hides no token.
        "pad_token": trainer.unk_piece,
        # Batches are continued from their last token, which must not be padding.
        "padding_side": "left",
        # transformers 4 gives every fast tokenizer token_type_ids unless told otherwise, and its GPT-2 adds word embeddings for them.
        "model_input_names": list(INPUT_NAMES),
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # The text "</s>" is text: only code ends a document.
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return TokenIds(trainer.unk_id, trainer.bos_id, trainer.eos_id, len(proto.pieces))


def copy_tokenizer(source: Path, folder: Path, vocab_size: int) -> dict[str, int | None]:
    """Copies the tokenizer of a Hugging Face folder as it is; returns its special ids by the names in SPECIAL.

    Raises UserError where the folder has none that transformers loads, or it has ids that a model of `vocab_size` tokens has no row for.
    """
    from transformers import AutoTokenizer

    names = [name for name in COPIED if (source / name).is_file()]
    if "tokenizer_config.json" not in names:
        raise UserError(
            f"tokenizer {source} is no folder with a tokenizer_config.json: name a Hugging Face folder, auto or none"
        )
    for name in names:
        shutil.copyfile(source / name, folder / name)
    _hand_over_two(folder / "tokenizer_config.json")
    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"tokenizer {source} cannot be loaded by transformers: {str(error).splitlines()[0]}"
        ) from error
    largest = max(loaded.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"tokenizer {source} has a token with id {largest}, but model.vocab_size={vocab_size}: is it the tokenizer of this model?"
        )
    return {key: getattr(loaded, key) for key in SPECIAL}


def _hand_over_two(path: Path) -> None:
    """Sets what a copied tokenizer hands to a model; a file that says so already keeps every byte."""
    settings = read_json(path, "name another folder, auto or none")
    if not isinstance(settings, dict):
        raise UserError(f"{path} is no JSON object: name another folder, auto or none")
    if settings.get("model_input_names") != list(INPUT_NAMES):
        settings["model_input_names"] = list(INPUT_NAMES)
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def prove(model_path: Path | str, folder: Path, texts: Iterable[str] = (), trust: bool = False) -> int:
    """Compares the tokenizer in `folder` with a SentencePiece model; returns how many texts have another segmentation of the same score.

    That is 0 for BPE. Unigram picks the best-scoring segmentation, SentencePiece in fp32 and the fast tokenizer in fp64, so that segmentations of equal
    score (the same pieces in another order, mostly) may be told apart by SentencePiece's rounding alone.
    trust: the folder has our modelling code, and asking whether to run it would stop an unattended export.
    Raises UserError naming the first text with other ids than that, or whose ids decode to another text.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    ours, fast = (
        SentencePieceProcessor(model_file=str(model_path)),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust),
    )
    what = f"the fast tokenizer made of {model_path}"
    size, unigram = ours.get_piece_size(), load_proto(model_path).trainer_spec.model_type == 1
    if len(fast) != size:
        raise UserError(f"{what} has {len(fast)} tokens, SentencePiece {size}; the export is refused")
    ties = 0
    for text in (*fuzz([ours.id_to_piece(i) for i in range(size)]), *texts):
        expected, got = reference_ids(ours, text), fast.encode(text, verbose=False)
        decoded, wanted = fast.decode(expected), ours.decode(expected)
        if decoded != wanted:
            raise UserError(
                f"{what} decodes the ids of {text!r} to {decoded!r}, SentencePiece to {wanted!r}; the export is refused"
            )
        if expected == got:
            continue
        if not unigram or not _tie(ours, expected, got):
            raise UserError(
                f"{what} gives other ids than SentencePiece for {text!r}: {_difference(expected, got)}; the export is refused"
            )
        ties += 1
    return ties


def reference_ids(model: Any, text: str) -> list[int]:
    """Ids of a text by a SentencePieceProcessor, with every SPACE_MARK in the text spelt as its bytes, as training data have it."""
    mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    first, *rest = (model.encode(part) for part in text.split(SPACE_MARK))
    return first + [index for part in rest for index in (*mark, *part)]


def _tie(ours: Any, expected: list[int], got: list[int]) -> bool:
    """Whether two segmentations of one text have the same text and score, up to the rounding of an fp32 sum."""
    scores = [sum(ours.get_score(i) for i in ids) for ids in (expected, got)]
    rounding = len(expected) * abs(scores[0]) * 2.0**-24
    return ours.decode(expected) == ours.decode(got) and abs(scores[0] - scores[1]) <= rounding


def _difference(expected: list[int], got: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    return f"from position {at}, {got[at : at + 8]} instead of {expected[at : at + 8]}"


FIXED = (
    *(
        "",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        " \n ",
        "\t\t  \t",
        "a",
        " a",
        "a ",
        "  a  b   c    ",
        "\x00",
        "\x01\x1f\x7f",
        "\u00a0\u2003\u3000",
        "\ufeffa",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "a</s>b<s>",
        "<0x0A>",
        "<0x00>x<0xFF>",
        "<",
        "<0",
        "<0x",
        "x<0x4",
        SPACE_MARK,
        f"{SPACE_MARK}{SPACE_MARK}a {SPACE_MARK}",
        "\ufffd",
        "\u2047",
    ),
    *(
        "Hello, world! It's 3.14159.",
        "don't  stop\nnow",
        "def f(x):\n    return x**2\n",
        "https://example.org/?a=1&b=%20",
        "1234567890" * 3,
        "a" * 100,
        " " * 70,
        "ab" * 60,
    ),
    *(
        "Größe",
        "na\u00efve nai\u0308ve",
        "日本語のテスト",
        "Привет, мир",
        "مرحبا بالعالم",
        "हिन्दी",
        "한국어 \u1112\u1161\u11ab",
        "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0001f1e9\U0001f1ea e\u0301\u0323",
        "\U0010ffff\ue000",
    ),
)


def fuzz(pieces: list[str], count: int = 600, seed: int = 0) -> Iterator[str]:
    """Texts that have found differences between tokenizers: whitespace of every kind, control characters, emoji, names of special tokens, random
    Unicode, and random joins of a tokenizer's own pieces, which reach merges that ordinary text does not. The same for the same pieces and seed."""
    yield from FIXED
    rng = random.Random(seed)
    whitespace, words = (
        [" ", "  ", "\n", "\t", "\r", "\x0b", "\u00a0", "\u2028"],
        [piece.replace(SPACE_MARK, " ") for piece in pieces],
    )
    for _ in range(count):
        kind, length = rng.randrange(4), rng.randrange(1, 60)
        if kind == 0:
            yield "".join(rng.choice(words) for _ in range(length))
        elif kind == 1:
            yield "".join(
                rng.choice(whitespace) if rng.random() < 0.5 else rng.choice(words) for _ in range(length)
            )
        elif kind == 2:
            yield "".join(
                chr(
                    rng.choice(
                        [
                            rng.randrange(0x80),
                            rng.randrange(0x250),
                            rng.randrange(0xD800),
                            rng.randrange(0xE000, 0x110000),
                        ]
                    )
                )
                for _ in range(length)
            )
        else:
            alphabet = rng.sample(sorted(set("".join(words))), 3)
            yield "".join(rng.choice(alphabet) for _ in range(length))
