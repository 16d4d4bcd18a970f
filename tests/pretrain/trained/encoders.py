"""A tiny encoder as a checkpoint, with a tokenizer and a data set made with it."""

from __future__ import annotations

import json
from pathlib import Path

from model.config import ModelConfig
from model.hf.export import export
from model.weights.init import logit_scale
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokens.train import special_names, train_tokenizer
from pretrain.trained.folders.import_hf import import_checkpoint
from tests.model.hf.tiny import POSITIONS, make_encoder, make_weights

SIZE = 340
TEXT = (
    "the deep layers norm the signal",
    "a scale of time in a deep layer",
    "def f(x):\n    return x",
)


def save_encoder(folder: Path, scheme: str = "b2t", **given: object) -> ModelConfig:
    """Writes FOLDER/special.model, FOLDER/data, FOLDER/hf and, read from that, FOLDER/run."""
    lines = [json.dumps({"text": f"{line} {number}"}) for number in range(40) for line in TEXT]
    (folder / "text.jsonl").write_text("\n".join(lines))
    source, tokenizer = [str(folder / "text.jsonl")], folder / "special.model"
    train_tokenizer(source, tokenizer, vocab_size=SIZE, special=special_names("all"))
    prepare(PrepareOptions(source, folder / "data", tokenizer, split=(0.5, 0.5, 0.0), workers=1))
    config = make_encoder(scheme, vocab_size=SIZE, **given)
    export(
        make_weights(config),
        config,
        folder / "hf",
        logit_scale=logit_scale(config),
        tokenizer=tokenizer,
        seq_length=POSITIONS,
        architecture="fathom",
    )
    import_checkpoint(str(folder / "hf"), folder / "run")
    return config
