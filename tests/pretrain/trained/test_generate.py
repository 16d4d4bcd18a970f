"""Text that is shown while it is generated.

The text of all ids, piece by piece, at a cost that does not grow with its length.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece
import torch

from model.errors import UserError
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import train_tokenizer
from pretrain.trained.generate import generate_text, stream

TEXT = "deep layers keep the signal\nthe norm of a residual stream\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ours, which keeps every space, and one that adds a space before a text, as Llama 2's does."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text(TEXT * 200)
    train_tokenizer([str(folder / "text.txt")], folder / "ours.model", vocab_size=300)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 50),
        model_prefix=str(folder / "prefix"),
        model_type="bpe",
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        minloglevel=2,
    )
    return {"ours": folder / "ours.model", "prefix": folder / "prefix.model"}


class Counting(Tokenizer):
    """Counts the ids that are decoded."""

    decoded = 0

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        self.decoded += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize("kind", ["ours", "prefix"])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_text_of_all_ids(tokenizers: dict[str, Path], kind: str, seed: int) -> None:
    """Random ids: bytes that are no UTF-8, control tokens, spaces.

    Also characters of several bytes.
    """
    tokenizer, rng = Counting(tokenizers[kind]), random.Random(seed)
    ids = tokenizer.encode("the größte")
    number = {tokenizer.codec.piece(index): index for index in range(tokenizer.vocab_size)}
    space = [number[piece] for piece in ("▁", "▁the") if piece in number]
    byte = [number[f"<0x{value:02X}>"] for value in range(256)]
    new: list[int] = []
    while len(new) < 400:
        choice = rng.randrange(5)
        if choice == 0:
            new += [byte[value] for value in rng.choice("é日😀").encode()]
        elif choice == 1:
            new += [byte[value] for value in rng.choice("日😀").encode()[: rng.randrange(1, 3)]]
        elif choice == 2:
            new += [rng.choice(space)] * rng.randrange(1, 4)
        else:
            new.append(rng.randrange(tokenizer.vocab_size))
    tokenizer.decoded = 0
    pieces = list(stream(tokenizer, ids, iter(new)))
    assert tokenizer.decoded < 20 * len(new)
    assert len(pieces) > 100
    whole = tokenizer.decode([*ids, *new])
    assert "".join(pieces) == whole[len(tokenizer.decode(ids)) :]


def test_a_character_is_shown_when_it_is_complete(tokenizers: dict[str, Path]) -> None:
    tokenizer = Tokenizer(tokenizers["ours"])
    start, smile = tokenizer.encode("the"), tokenizer.encode("😀a😀")
    assert list(stream(tokenizer, start, iter(smile))) == ["😀", "a", "😀"]
    assert list(stream(tokenizer, start, iter(smile[:-1]))) == ["😀", "a", "\ufffd\ufffd\ufffd"]


def test_ids_that_the_tokenizer_does_not_know_have_no_text(tokenizers: dict[str, Path]) -> None:
    """An imported model may have more rows than its tokenizer has pieces."""
    tokenizer = Tokenizer(tokenizers["ours"])
    ids = tokenizer.encode("the norm")
    assert "".join(stream(tokenizer, [], iter([ids[0], 100_000, *ids[1:]]))) == "the norm"


@pytest.fixture
def checkpoint(imported_gpt2: Path) -> Path:
    return imported_gpt2 / "checkpoint"


def test_the_default_fits_the_model(checkpoint: Path) -> None:
    assert "".join(generate_text(checkpoint, "the", temperature=0))
    with pytest.raises(
        UserError, match="--max-new-tokens 64 does not fit: the prompt has . tokens? and the model 32"
    ):
        generate_text(checkpoint, "the", 64)
    with pytest.raises(UserError, match="leaves no room"):
        generate_text(checkpoint, "deep " * 100)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_p": float("nan")}, "--top-p nan"),
        ({"top_k": 0}, "--top-k 0"),
        ({"seed": 1 << 64}, "--seed 18446744073709551616"),
        ({"prompt": "a\udcff"}, "the prompt is not valid text"),
    ],
)
def test_settings_out_of_range_are_one_line(
    checkpoint: Path, settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        generate_text(checkpoint, **{"prompt": "the", "max_new_tokens": 4, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_not_finite(temperature: float) -> None:
    from model.hf.reference import generate
    from tests.model.hf.tiny import make_config, make_weights

    weights = make_weights(make_config())
    weights["decoder.final_layernorm.weight"][0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        list(generate(weights, make_config(), [1], 4, temperature, logit_scale=1.0))


def test_the_smallest_temperature_is_the_likeliest_token() -> None:
    from model.hf.reference import pick

    logits = torch.tensor([1.0, 3.0, 2.0])
    assert pick(logits, 1e-320, None, None, torch.Generator().manual_seed(0)) == 1
