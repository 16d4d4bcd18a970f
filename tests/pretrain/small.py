"""A data set of a few thousand tokens, and runs on it inside the test process."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from parallel.launch.one_process import single_process
from pretrain.config.schema import (
    Corpus,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.prepare_pairs import PairOptions, prepare_pairs
from pretrain.data.reading.pairs import Sides
from pretrain.data.samples import open_samples
from pretrain.data.tokens.reserved import Reserved
from pretrain.data.tokens.train import train_tokenizer
from pretrain.train.build import build_engine
from pretrain.train.callbacks.base import Callback, EvalRecord, StepRecord
from pretrain.train.loop import Trainer

VOCAB = 300


def small_data(folder: Path, special: Reserved | None = None) -> Path:
    """Prepares words in random order whose frequencies fall as 1/rank.

    special: of the tokenizer's, as `special_names` returns them.

    Returns the data set folder.
    """
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=5)) for _ in range(60)]
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for index in range(40):
        (texts / f"{index}.txt").write_text(
            " ".join(generator.choices(words, [1 / (rank + 1) for rank in range(60)], k=120))
        )
    train_tokenizer([str(texts)], folder / "tokenizer.model", VOCAB, "bpe", special=special)
    prepare(
        PrepareOptions(
            inputs=[str(texts)],
            out=folder / "data",
            tokenizer=folder / "tokenizer.model",
            split=(0.8, 0.2, 0.0),
            workers=1,
        )
    )
    return folder / "data"


def small_pairs(folder: Path) -> Path:
    """Prepares pairs of a few words and the same words backwards. Returns the data set folder."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(30)]
    texts = [generator.choices(words, k=generator.randint(1, 6)) for _ in range(200)]
    folder.mkdir(parents=True, exist_ok=True)
    sides = [" ".join(text) for text in texts], [" ".join(text[::-1][:4]) for text in texts]
    (folder / "words.txt").write_text(" ".join(sides[0]))
    lines = ("\t".join(pair) + "\n" for pair in zip(*sides, strict=True))
    (folder / "pairs.tsv").write_text("".join(lines))
    train_tokenizer([str(folder / "words.txt")], folder / "tokenizer.model", VOCAB, "bpe")
    prepare_pairs(
        PairOptions(
            [str(folder / "pairs.tsv")],
            folder / "data",
            folder / "tokenizer.model",
            sides=Sides("1", "2"),
            split=(0.8, 0.2, 0.0),
            workers=1,
        )
    )
    return folder / "data"


def small_config(data: Path, runs: Path, steps: int, *, signal_interval: int = 1, **model: Any) -> RunConfig:
    """A run of a model of width 16 with VOCAB tokens on `data`, two micro-batches a step.

    model: further fields of the model section.
    """
    fields = {
        "scheme": "pre_ln",
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 16,
    }
    return RunConfig(
        name="small",
        runs_dir=str(runs),
        model=ModelConfig.model_validate({**fields, **model}),
        data=DataConfig(corpora=[Corpus(path=str(data))], seq_length=16),
        optimizer=OptimizerConfig(lr=1e-2),
        schedule=ScheduleConfig(kind="constant"),
        train=TrainConfig(steps=steps, global_batch_size=4, micro_batch_size=2, eval_samples=4),
        log=LogConfig(signal_interval=signal_interval, progress="none", tensorboard=False),
    )


def small_trainer(config: RunConfig) -> Trainer:
    """The trainer of a run, without callbacks."""
    kind = config.task.samples
    data = {split: open_samples(config, kind, split) for split in ("train", "validation")}
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    topology = copy.copy(single_process())
    topology.layout = replace(topology.layout, zero=config.parallel.zero)
    log_p_v = data["train"].blend.log_frequencies() if config.model.init.unigram else None
    engine = build_engine(config, topology, log_p_v)
    return Trainer(config, folder, engine, data["train"], data["validation"], [])


class Told(Callback):
    """What a run reports."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.evaluations: list[EvalRecord] = []

    def on_step(self, trainer: object, record: StepRecord) -> None:
        self.losses.append(record["loss"])

    def on_eval(self, trainer: object, record: EvalRecord) -> None:
        self.evaluations.append(record)


def trained(config: RunConfig) -> tuple[Trainer, Told]:
    """A run to its end, from its newest checkpoint where there is one."""
    trainer, told = small_trainer(config), Told()
    trainer.callbacks.append(told)
    trainer.resume()
    trainer.run()
    return trainer, told


def step_record(seconds: float = 1.0) -> StepRecord:
    """What a callback is told of a step that took so long."""
    return StepRecord(
        step=1,
        loss=1.0,
        grad_norm=1.0,
        lr=1.0,
        tokens=1,
        tokens_per_s=1.0,
        step_time_s=seconds,
        data_wait_share=0.0,
        skipped=False,
    )
