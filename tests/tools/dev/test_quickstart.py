"""The quick start's own decisions; its steps are tested where they live."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from model.depth.schemes import scheme_names
from tools.dev import quickstart


def test_every_scheme_has_its_settings() -> None:
    assert {path.stem for path in Path("configs/scheme").glob("*.yaml")} >= set(scheme_names())


def test_half_way_is_half_of_the_steps() -> None:
    assert quickstart.half_way(["configs/quickstart.yaml", "train.steps=90"]) == 45


def test_a_step_that_is_done_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.step(True, "the thing", ["pretrain", "no_such_file.yaml"])
    assert "already there: the thing" in capsys.readouterr().out


def test_a_failing_step_ends_with_its_code() -> None:
    with pytest.raises(typer.Exit) as left:
        quickstart.step(False, "", ["pretrain", "no_such_file.yaml"])
    assert left.value.exit_code == 2


def test_an_unknown_scheme_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tools.dev.quickstart", "--scheme", "b3t"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "choose one of" in result.stdout
