"""A run in bf16 with an fp32 stream, evaluated and exported in the precision of its training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.checkpoint.format import Sections, TrainSection
from pretrain.trained.folders.export import export_checkpoint, trained_in_16_bits
from pretrain.trained.measures.perplexity import evaluate
from tests.pretrain.small import small_config, small_data, small_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run folder, and what its trainer evaluated to."""
    folder = tmp_path_factory.mktemp("half")
    config = small_config(small_data(folder), folder / "runs", 2, scheme="deepscalelm_pre_ln")
    config.train.precision, config.train.fp32_residual = "bf16", True
    trainer, seen = small_trainer(config), []
    trainer.tell = lambda moment, *args: seen.append(args[0]) if moment == "on_eval" else None  # type: ignore[method-assign]
    trainer.run()
    return {"folder": folder / "runs" / "small", "eval": seen[-1]}


def test_an_evaluation_has_the_fp32_stream_of_the_run(run: dict[str, Any]) -> None:
    found = evaluate(run["folder"], samples=run["eval"]["samples"])
    assert found.nats / found.tokens == pytest.approx(run["eval"]["loss"], rel=1e-6)


def test_an_export_is_proved_in_the_precision_of_the_run(run: dict[str, Any], tmp_path: Path) -> None:
    proof = export_checkpoint(run["folder"], tmp_path / "hf").proof
    assert proof.trained is not None
    assert 0.999 < proof.trained < 1


@pytest.mark.parametrize(
    ("wish", "started", "half"),
    [
        ("bf16", None, True),
        ("fp32", None, False),
        ("auto", None, True),
        ("auto", "float32", False),
        ("auto", "bfloat16", True),
        ("auto", "fp8", True),
        (None, None, False),
    ],
)
def test_what_a_run_computed_in(tmp_path: Path, wish: str | None, started: str | None, half: bool) -> None:
    if started:
        line = {"event": "start", "step": 0, "precision": started}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    said = Sections(train=TrainSection(precision=wish))
    reader = SimpleNamespace(folder=tmp_path / "checkpoints" / "step_00000001", sections=said)
    assert trained_in_16_bits(SimpleNamespace(reader=reader)) is half  # type: ignore[arg-type]
