"""A small encoder-decoder, trained from pairs of texts to a checkpoint in processes of its own."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pretrain.data.prepare_pairs import PairOptions, prepare_pairs
from pretrain.data.reading.pairs import Sides
from pretrain.data.tokens.train import Reading, special_names, train_tokenizer
from tests.running import run

EN_DE = Sides("en", "de")
NOUNS = (("house", "Haus"), ("boat", "Boot"), ("child", "Kind"), ("book", "Buch"), ("bed", "Bett"))
WORDS = (("big", "großes"), ("small", "kleines"), ("red", "rotes"), ("old", "altes"), ("new", "neues"))
CONFIG = """
name: run
runs_dir: {folder}
model:
  family: seq2seq
  num_layers: 2
  encoder_layers: 1
  hidden_size: 32
  num_attention_heads: 4
  activation: relu
  position: {position}
data:
  corpora: [{{path: {folder}/data}}]
  source_length: 40
  seq_length: 48
optimizer: {{lr: 1e-2, weight_decay: 0.0}}
schedule: {{kind: inverse_sqrt, warmup_steps: 10}}
train: {{steps: {steps}, global_batch_size: 4, micro_batch_size: 4, eval_interval: {steps}, eval_samples: 2,
  label_smoothing: 0.1}}
log: {{signal_interval: 20, tensorboard: false}}
"""


def sentence(draw: random.Random) -> tuple[str, str]:
    """A pair of one to three things."""
    parts = [(draw.choice(WORDS), draw.choice(NOUNS)) for _ in range(draw.randint(1, 3))]
    return (
        " and ".join(f"a {word[0]} {noun[0]}" for word, noun in parts),
        " und ".join(f"ein {word[1]} {noun[1]}" for word, noun in parts),
    )


def save_translator(folder: Path, position: str = "learned", steps: int = 40) -> None:
    """Writes FOLDER/joint.model, FOLDER/data, and FOLDER/run with a checkpoint."""
    draw = random.Random(0)
    pairs = dict(sentence(draw) for _ in range(400))
    lines = [json.dumps(dict(zip(EN_DE, pair, strict=True))) + "\n" for pair in pairs.items()]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    source, tokenizer = [str(folder / "pairs.jsonl")], folder / "joint.model"
    train_tokenizer(
        source, tokenizer, vocab_size=310, special=special_names("pad"), reading=Reading(sides=EN_DE)
    )
    split = (0.8, 0.1, 0.1)
    prepare_pairs(PairOptions(source, folder / "data", tokenizer, split=split, workers=1, sides=EN_DE))
    config = folder / "run.yaml"
    config.write_text(CONFIG.format(folder=folder, steps=steps, position=position))
    done = run("pretrain", config, "--quiet", limit=300)
    assert done.code == 0, done.err
