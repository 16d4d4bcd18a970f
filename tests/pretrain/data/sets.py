"""Small data sets whose samples tests can work out, and readers of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pretrain.config.schema import Corpus
from pretrain.data.blend import TokenBlend, open_blend
from pretrain.data.indexed import IndexedDataset
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokens.train import train_tokenizer

SEQ = 32


def write_set(
    folder: Path,
    tokenizer: Path,
    word: str,
    documents: int,
    split: tuple[float, float, float] = (0.8, 0.2, 0.0),
) -> None:
    generator = random.Random(word)
    lines = [
        " ".join(f"{word} {generator.randrange(1000)}" for _ in range(generator.randrange(1, 40)))
        for _ in range(documents)
    ]
    (folder.parent / f"{word}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare(PrepareOptions([str(folder.parent / f"{word}.jsonl")], folder, tokenizer, split=split, workers=1))


def write_sets(root: Path) -> Path:
    """Data sets `red` and `blue` with one tokenizer, `other` with another.

    `short` has too little validation data.
    """
    (root / "text.txt").write_text("red blue other short 0123456789 " * 50)
    for name, size in (("one", 290), ("two", 291)):
        train_tokenizer([str(root / "text.txt")], root / f"{name}.model", vocab_size=size)
    write_set(root / "red", root / "one.model", "red", 120)
    write_set(root / "blue", root / "one.model", "blue", 60)
    write_set(root / "other", root / "two.model", "other", 20)
    write_set(root / "short", root / "one.model", "short", 3, (1.0, 0.0, 0.0))
    return root


def blend(
    sets: Path,
    *names: str,
    weights: tuple[float, ...] = (1.0, 1.0),
    split: str = "train",
    seed: int = 7,
    seq_length: int = SEQ,
) -> TokenBlend:
    corpora = [
        Corpus(path=str(sets / name), weight=weight) for name, weight in zip(names, weights, strict=False)
    ]
    return open_blend(corpora, split, seq_length, seed, sets / "cache")


def documents(sets: Path, name: str, split: str = "train") -> list[list[int]]:
    dataset = IndexedDataset(str(sets / name / split))
    return [dataset[index].tolist() for index in range(len(dataset))]
