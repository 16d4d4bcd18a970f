"""Whether a fast tokenizer gives SentencePiece's ids and text, on texts that found differences."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.hf.tokenizer.convert import OTHERWISE, load_proto
from model.hf.tokenizer.special import SPACE_MARK

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class TokenizerProofError(UserError):
    """transformers gives other ids or text with an exported tokenizer than training had.

    fact: which and how. The message also says what to do.
    """

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}; {OTHERWISE}")
        self.fact = fact


def read_as(fast: object) -> str:
    """What a difference says of the class that transformers chose; empty for the general one.

    Of some models it takes another class than tokenizer_config.json names.
    """
    name = type(fast).__name__
    return "" if name in GENERAL else f", which transformers reads as {name} here,"


GENERAL = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""The class that uses a tokenizer.json as it is, in transformers 5 and 4."""


def prove(model_path: Path | str, folder: Path, texts: Iterable[str] = (), trust: bool = False) -> int:
    """Compares the tokenizer in `folder` with a SentencePiece model.

    Returns how many texts have another segmentation of the same score. That is 0 for BPE.
    Unigram picks the best-scoring segmentation, SentencePiece in fp32 and the fast tokenizer in
    fp64, so that segmentations of equal score (the same pieces in another order, mostly) may be
    told apart by SentencePiece's rounding alone.
    trust: the folder has our modelling code, and asking whether to run it would stop an export.
    Raises TokenizerProofError naming the first text with other ids than that,
    or whose ids decode to another text.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    ours, fast = (
        SentencePieceProcessor(model_file=str(model_path)),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust),
    )
    what = f"the fast tokenizer made of {model_path}{read_as(fast)}"
    size, unigram = ours.get_piece_size(), load_proto(model_path).trainer_spec.model_type == 1
    if len(fast) != size:
        raise TokenizerProofError(f"{what} has {len(fast)} tokens, SentencePiece {size}")
    ties = 0
    for text in (*fuzz([ours.id_to_piece(i) for i in range(size)]), *texts):
        expected, got = reference_ids(ours, text), fast.encode(text, **AS_TEXT)
        decoded, wanted = fast.decode(expected), ours.decode(expected)
        if decoded != wanted:
            theirs = f"decodes the ids of {text!r} to {decoded!r}, SentencePiece to {wanted!r}"
            raise TokenizerProofError(f"{what} {theirs}")
        if expected == got:
            continue
        if not unigram or not _tie(ours, expected, got):
            theirs = f"gives other ids than SentencePiece for {text!r}: {difference(expected, got)}"
            raise TokenizerProofError(f"{what} {theirs}")
        ties += 1
    return ties


# Without marks, and with names of special tokens as text: training data have it so.
AS_TEXT: dict[str, bool] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


def reference_ids(model: SentencePieceProcessor, text: str) -> list[int]:
    """Ids of a text by SentencePiece.

    Every SPACE_MARK in the text is spelt as its bytes, as training data have it.
    """
    mark = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    first, *rest = (model.encode(part) for part in text.split(SPACE_MARK))
    return first + [index for part in rest for index in (*mark, *part)]


def _tie(ours: SentencePieceProcessor, expected: list[int], got: list[int]) -> bool:
    """Whether two segmentations have the same text and score, up to the rounding of an fp32 sum."""
    scores = [sum(ours.get_score(i) for i in ids) for ids in (expected, got)]
    rounding = len(expected) * abs(scores[0]) * 2.0**-24
    return ours.decode(expected) == ours.decode(got) and abs(scores[0] - scores[1]) <= rounding


def difference(expected: list[int], got: list[int]) -> str:
    """Where two lists of ids first differ, and how, in a phrase."""
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
    """Texts that have found differences between tokenizers.

    Whitespace of every kind, control characters, emoji, names of special tokens, random Unicode,
    and random joins of a tokenizer's own pieces, which reach merges that ordinary text does not.
    The same for the same pieces and seed.
    """
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
