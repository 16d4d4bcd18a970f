"""Masked language modelling from text to checkpoint: what is learnt, and exact resumption."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from pretrain.config.compose import SHIPPED
from pretrain.config.load import complete_model, load_config
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import load_manifest
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.reading.inputs import standard_library_files
from pretrain.data.tokens.train import special_names, train_tokenizer
from tests.pretrain.small import trained


def prepared(folder: Path, inputs: list[str], vocab: int) -> Path:
    train_tokenizer(inputs, folder / "tokenizer.model", vocab, special=special_names("all"))
    options = PrepareOptions(
        inputs, folder / "data", folder / "tokenizer.model", split=(0.9, 0.1, 0.0), workers=1
    )
    prepare(options)
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short and long documents of words whose frequencies fall."""
    folder, draw = tmp_path_factory.mktemp("masked"), random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=4)) for _ in range(40)]
    texts = [
        " ".join(draw.choices(words, [1 / (n + 1) for n in range(40)], k=draw.randint(2, 60)))
        for _ in range(60)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepared(folder, [str(folder / "texts.jsonl")], 320)


def config_of(data: Path, runs: Path, *overrides: str) -> RunConfig:
    given = [f"data.corpora=[{{path: {data}}}]", f"runs_dir={runs}", "parallel.processes=1", *overrides]
    config = load_config(SHIPPED / "quickstart_bert.yaml", given)
    config.model = complete_model(config, load_manifest(data).vocab_size)
    return config


SMALL = (
    "model.num_layers=3",
    "model.hidden_size=16",
    "data.seq_length=24",
    "train.steps=4",
    "log.signal_interval=0",
)


@pytest.mark.parametrize("packed", ["true", "false"])
def test_a_run_that_stops_goes_on_bit_for_bit(packed: str, data: Path, tmp_path: Path) -> None:
    settings = (*SMALL, f"masking.packed={packed}", "model.position=learned", "model.token_types=2")
    whole, told = trained(config_of(data, tmp_path / "whole", *settings))
    _, first = trained(config_of(data, tmp_path / "parts", *settings, "train.stop_at_step=2"))
    parts, second = trained(config_of(data, tmp_path / "parts", *settings))
    assert first.losses + second.losses == told.losses
    assert second.evaluations == told.evaluations
    for ours, theirs in zip(parts.engine.parameters, whole.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


def test_the_mask_tokens_share_is_planned_for(data: Path, tmp_path: Path) -> None:
    assert config_of(data, tmp_path).model.init.mask_token_share == pytest.approx(0.3 * 0.8)
    assert config_of(data, tmp_path, "+include=recipe/b2t.yaml").model.init.mask_token_share is None


@pytest.mark.slow
def test_an_encoder_of_48_layers_learns_more_than_frequencies(tmp_path: Path) -> None:
    data = prepared(tmp_path, [str(path) for path in standard_library_files()][:60], 400)
    trainer, told = trained(config_of(data, tmp_path, "log.signal_interval=0"))
    entropy = trainer.train_data.entropy
    assert entropy is not None
    assert told.evaluations[-1]["loss"] < entropy - 0.2
    assert told.evaluations[-1]["accuracy"] > told.evaluations[0]["accuracy"] > 0
