"""A start that is refused leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.rundir.lock import UnwritableError, owned
from pretrain.train.checks.before_start import FirstStart, check_before_start
from tests.pretrain.small import small_config, small_data


def traces(run_dir: Path) -> None:
    for name in ("control/local.0.rank00000.json", ".lock", "preflight.json", "config.yaml"):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("")


def test_what_a_refused_start_made_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    first = FirstStart(tmp_path / "runs" / "sweep" / "demo")
    traces(first.run_dir)
    first.take_back()
    assert [*tmp_path.rglob("*")] == [tmp_path / "runs"]


@pytest.mark.parametrize(
    "case", ["it was there", "it has more", "another start has it", "another run is beside it"]
)
def test_what_is_not_of_the_refused_start_stays(tmp_path: Path, case: str) -> None:
    run_dir = tmp_path / "runs" / "demo"
    if case == "it was there":
        traces(run_dir)
    first = FirstStart(run_dir)
    traces(run_dir)
    if case == "it has more":
        (run_dir / "metrics.jsonl").write_text("")
    if case == "another run is beside it":
        traces(tmp_path / "runs" / "other")
    if case == "another start has it":
        with owned(run_dir, 0):
            first.take_back()
    else:
        first.take_back()
    assert run_dir.exists() is (case != "another run is beside it")
    assert (tmp_path / "runs" / "other").exists() is (case == "another run is beside it")


def test_what_is_missing_is_found_before_anything_is_written(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    config = small_config(data, tmp_path / "runs", 2)
    check_before_start(config)
    load = config.checkpoint.model_copy(update={"load": "/nonexistent"})
    with pytest.raises(UserError, match=r"checkpoint\.load: /nonexistent holds no checkpoint"):
        check_before_start(config.model_copy(update={"checkpoint": load}))
    large = config.model.model_copy(update={"num_layers": 100_000, "hidden_size": 8192})
    with pytest.raises(
        UserError, match=r"small has .* GiB free, one checkpoint takes about .* GiB: make room, or set"
    ):
        check_before_start(config.model_copy(update={"model": large}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
def test_a_folder_that_cannot_be_made_is_not_called_full(tmp_path: Path) -> None:
    """Of a file system without room for anything, not even one byte."""
    config = small_config(small_data(tmp_path), Path("/proc/nothing"), 2)
    check_before_start(config)
    with (
        pytest.raises(UnwritableError, match="runs_dir: /proc/nothing/small cannot be written"),
        owned(Path(config.runs_dir) / config.name, 0),
    ):
        pass
