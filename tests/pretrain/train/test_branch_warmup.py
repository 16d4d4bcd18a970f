"""`schedule.branch` in whole runs: continued bit for bit, evaluated as is, exported when over."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import UserError
from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import BranchConfig
from pretrain.rundir.metrics import read_metrics
from pretrain.train.branch_warmup import branch_shares, remark
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.generate import generate_text
from pretrain.trained.measures.perplexity import evaluate
from tests.parallel.training import run_config
from tests.pretrain.small import small_data
from tests.pretrain.train.test_run import CONFIG, losses, run

LAYERS, SPAN, STEPS = 3, 2, 8
LAST = LAYERS * SPAN
WARMING = f"schedule.branch={{kind: linear, steps: {SPAN}}}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("DATA", str(small_data(folder))))
    return path


@pytest.fixture(scope="module")
def stopped(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that left in the middle of its warm-up, at an evaluation."""
    runs = tmp_path_factory.mktemp("stopped")
    code, errors = run(config, runs, WARMING, "train.stop_at_step=4")
    assert code == ExitCode.STOPPED_BY_USER, errors
    return runs


def test_before_the_end_a_checkpoint_is_evaluated_as_in_the_run(stopped: Path) -> None:
    trained = read_metrics(stopped / "tiny" / "metrics.jsonl").eval[-1]
    assert trained.step == 4 < LAST
    found = evaluate(stopped / "tiny", samples=trained.samples)
    assert found.nats / found.tokens == pytest.approx(trained.loss, rel=1e-6)


def test_before_the_end_nothing_else_is_made_of_a_checkpoint(stopped: Path, tmp_path: Path) -> None:
    over = rf"\(schedule\.branch\.kind=linear\) is not over at step 4, it ends at step {LAST}: use a"
    with pytest.raises(UserError, match=over):
        export_checkpoint(stopped / "tiny", tmp_path / "out")
    with pytest.raises(UserError, match=over):
        next(generate_text(stopped / "tiny", "a", 1))
    assert not list(tmp_path.iterdir())


def test_continued_it_is_the_whole_run_and_is_exported(config: Path, stopped: Path, tmp_path: Path) -> None:
    code, errors = run(config, tmp_path, WARMING)
    assert code == ExitCode.FINISHED, errors
    assert run(config, stopped, WARMING)[0] == ExitCode.FINISHED
    assert losses(stopped) == losses(tmp_path)
    assert len(losses(tmp_path)) == STEPS
    assert export_checkpoint(tmp_path / "tiny", tmp_path / "out").proof.difference < 1e-4


def test_without_a_warm_up_no_layer_has_anything_to_read() -> None:
    assert branch_shares(run_config(), []) is None


def test_a_warm_up_longer_than_the_run_is_told() -> None:
    config = run_config(train={"steps": 7}, schedule={"branch": {"kind": "equal", "steps": 2}})
    assert "ends the warm-up of 4 layers at step 8, after the run (train.steps=7)" in remark(config)
    assert remark(config.model_copy(update={"train": config.train.model_copy(update={"steps": 8})})) == ""


def test_half_a_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=5 has no effect with schedule.branch.kind=none"):
        BranchConfig(steps=5)
    with pytest.raises(ValueError, match="kind=equal needs schedule.branch.steps"):
        BranchConfig(kind="equal")
