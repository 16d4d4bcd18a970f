"""The validation loss is of exactly the same samples on every layout, however few they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.schema import Corpus
from pretrain.data.blend import open_blend
from pretrain.data.order import BlendPattern
from pretrain.data.samples import next_tokens, open_samples
from pretrain.train.validation import Validation
from tests.distributed import Group, launch
from tests.parallel.training import engine_of, given, run_config
from tests.pretrain.small import VOCAB, small_config, small_data, small_trainer

SAMPLES = (1, 5, 8)
MODEL = given(vocab_size=VOCAB, num_layers=4)
SHARDED, INTERLEAVED = given(tensor=2, sequence_parallel=True), given(pipeline=2, virtual_stages=2)
CASES: dict[str, tuple[int, dict[str, Any], int]] = {
    # (processes, layout, micro-batch)
    "one process, 1": (1, {}, 1),
    "one process, 4": (1, {}, 4),
    "DP2, 3": (2, {}, 3),
    "TP2 + SP, 2": (2, SHARDED, 2),
    "PP2, 4": (2, given(pipeline=2), 4),
    "PP2 interleaved, 2": (2, INTERLEAVED, 2),
    "DP4, 1": (4, given(zero=2), 1),
    "DP2 x PP2 interleaved, 1": (4, INTERLEAVED, 1),
}


def losses(data: str, layout: dict[str, Any], micro: int) -> list[float]:
    """Inside ranks: the loss of the first samples, for each number of them."""
    found = []
    engine = None
    for samples in SAMPLES:
        train = given(micro_batch_size=micro, global_batch_size=24, eval_samples=samples)
        config = run_config(MODEL, layout, train)
        config.data.corpora = [Corpus(path=data)]
        engine = engine or engine_of(config)
        held_out = open_samples(config, "next_token", "validation")
        measured = Validation(config, engine, held_out).measure()
        assert measured.labels == samples * config.data.seq_length
        assert measured.accuracy is None
        found.append(measured.loss)
    return found


def one_by_one(data: str) -> list[float]:
    """The same, from one forward pass a sample."""
    config = run_config(MODEL, {}, given(micro_batch_size=1, eval_samples=1))
    engine = engine_of(config)
    blend = open_blend([Corpus(path=data)], "validation", config.data.seq_length, 0, None)
    (chunk,) = engine.chunks
    with torch.no_grad():
        each = [
            float(chunk(next_tokens(blend.batch([index]))).double().mean()) for index in range(max(SAMPLES))
        ]
    return [sum(each[:samples]) / samples for samples in SAMPLES]


def test_every_layout_evaluates_the_same_samples(tmp_path: Path) -> None:
    data = str(small_data(tmp_path))
    groups = [Group(world, losses, (data, layout, micro)) for world, layout, micro in CASES.values()]
    (expected, *_), *found = launch(Group(1, one_by_one, (data,)), *groups)
    assert len(set(expected)) == len(SAMPLES)
    for name, ranks in zip(CASES, found, strict=True):
        for ours in ranks:
            assert ours == pytest.approx(expected, rel=1e-6), name


def test_a_split_that_is_smaller_than_asked_for_is_evaluated_whole_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path)
    tokens = json.loads((data / "dataset.json").read_text())["splits"]["validation"]["tokens"]
    config = small_config(data, tmp_path, 1, signal_interval=0)
    available = (tokens - 1) // config.data.seq_length
    config.train.eval_samples = 1 << 24
    assert small_trainer(config).validation.samples == available
    whole = f"the validation split has {available} windows of data.seq_length=16, which are all evaluated"
    assert capsys.readouterr().err == f"fathom: train.eval_samples=16777216: {whole}\n"
    config.train.eval_samples = available
    assert small_trainer(config).validation.samples == available
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0], [3.0, 1.0], [1.0, 50.0]])
def test_a_blend_ends_where_a_corpus_would_repeat(weights: list[float]) -> None:
    available = [40, 90][: len(weights)]
    pattern = BlendPattern(weights, block=64)
    taken, count = [0] * len(weights), 0
    while taken[corpus := pattern.locate(count)[0]] < available[corpus]:
        taken[corpus] += 1
        count += 1
    assert pattern.until(available, 10**30) == count
    assert pattern.until(available, count + 1) == count
    assert pattern.until(available, 7) == 7
