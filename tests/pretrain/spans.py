"""A small run of span corruption inside the test process."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pretrain.config.compose import SHIPPED
from pretrain.config.load import complete_model, load_config
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import load_manifest
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokens.train import special_names, train_tokenizer

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "data.source_length=24",
    "data.seq_length=12",
    "train.steps=4",
    "log.signal_interval=0",
    "parallel.processes=1",
)


def span_data(folder: Path) -> Path:
    """Documents of words whose frequencies fall, with a tokenizer of 4 sentinels."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=4)) for _ in range(40)]
    shares = [1 / (n + 1) for n in range(40)]
    texts = [" ".join(draw.choices(words, shares, k=draw.randint(2, 60))) for _ in range(60)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(source)], folder / "t.model", 320, special=special_names("pad,sentinels=4"))
    split = (0.9, 0.1, 0.0)
    prepare(PrepareOptions([str(source)], folder / "data", folder / "t.model", split=split, workers=1))
    return folder / "data"


def span_config(data: Path, runs: Path, *overrides: str) -> RunConfig:
    """`configs/span_corruption.yaml`, made small."""
    given = [f"data.corpora=[{{path: {data}}}]", f"runs_dir={runs}", *SMALL, *overrides]
    config = load_config(SHIPPED / "span_corruption.yaml", given)
    config.model = complete_model(config, load_manifest(data).vocab_size)
    return config
