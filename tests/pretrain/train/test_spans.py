"""Span corruption from text to checkpoint: exact resumption, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from model.errors import UserError
from pretrain.config.compose import SHIPPED
from pretrain.config.load import complete_model, load_config
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import load_manifest
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokens.train import special_names, train_tokenizer
from pretrain.train.callbacks.base import Callback, EvalRecord, StepRecord
from pretrain.train.loop import Trainer
from tests.pretrain.small import small_trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of words whose frequencies fall."""
    folder, draw = tmp_path_factory.mktemp("spans"), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=4)) for _ in range(40)]
    shares = [1 / (n + 1) for n in range(40)]
    texts = [" ".join(draw.choices(words, shares, k=draw.randint(2, 60))) for _ in range(60)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    reserved = special_names("pad,sentinels=4")
    train_tokenizer([str(source)], folder / "t.model", 320, special=reserved)
    options = PrepareOptions(
        [str(source)], folder / "data", folder / "t.model", split=(0.9, 0.1, 0), workers=1
    )
    prepare(options)
    return folder / "data"


def config_of(data: Path, runs: Path, *overrides: str) -> RunConfig:
    small = ("model.num_layers=2", "model.hidden_size=16", "data.source_length=24", "data.seq_length=12",
             "train.steps=4", "log.signal_interval=0", "parallel.processes=1")  # fmt: skip
    given = [f"data.corpora=[{{path: {data}}}]", f"runs_dir={runs}", *small, *overrides]
    config = load_config(SHIPPED / "span_corruption.yaml", given)
    config.model = complete_model(config, load_manifest(data).vocab_size)
    return config


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
    trainer, told = small_trainer(config), Told()
    trainer.callbacks.append(told)
    trainer.resume()
    trainer.run()
    return trainer, told


def test_a_run_that_stops_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, told = trained(config_of(data, tmp_path / "whole"))
    _, first = trained(config_of(data, tmp_path / "parts", "train.stop_at_step=2"))
    with pytest.raises(UserError, match=r"was trained with spans.density=0\.15, .* 0\.3: change it back"):
        trained(config_of(data, tmp_path / "parts", "spans.density=0.3"))
    parts, second = trained(config_of(data, tmp_path / "parts"))
    assert first.losses + second.losses == told.losses
    assert second.evaluations == told.evaluations
    for ours, theirs in zip(parts.engine.parameters, whole.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


def test_an_evaluation_counts_targets(data: Path, tmp_path: Path) -> None:
    """24 tokens of source: 4 of a text of 26 are hidden in one span; 4 + 1 + 1 labels a sample."""
    _, told = trained(config_of(data, tmp_path))
    evaluation = told.evaluations[-1]
    assert evaluation["samples"] > 1
    assert evaluation["tokens"] == evaluation["samples"] * 6
    assert 4 < evaluation["loss"] < 8


def test_lengths_that_leave_no_text_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.source_length=2 is too short for train\.task=span_corruption"
    ):
        load_config(SHIPPED / "span_corruption.yaml", ["data.source_length=2"])
