"""The quick start's own decisions; its steps are tested where they live."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from model.depth.schemes import scheme_names
from pretrain.config.load import load_config
from pretrain.trained.folders.verify_export import CHECKS
from tools.dev import quickstart
from tools.dev.quickstarts import QUICKSTARTS, SCHEME


def test_every_scheme_has_its_settings() -> None:
    assert {path.stem for path in Path("configs/scheme").glob("*.yaml")} >= set(scheme_names())


def test_half_way_is_half_of_the_steps() -> None:
    assert quickstart.half_way(["configs/quickstart.yaml", "train.steps=90"]) == 45


def test_a_step_that_is_done_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    long = ["pretrain", "no_such_file.yaml", f"name={'n' * 80}"]
    quickstart.step(True, "the thing", long)
    shown = capsys.readouterr().out
    assert "already there: the thing" in shown
    assert f"$ fathom {' '.join(long)}\n" in shown  # whole, to be copied


def test_commands_to_go_on_with_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("runs") / ("n" * 80)
    for start in QUICKSTARTS.values():
        quickstart.closing(start, folder, "b2t", 60, 60)
        lines = capsys.readouterr().out.splitlines()
        assert f"  {'continue':12} {start.go_on.format(folder=folder)}" in lines


def test_a_failing_step_ends_with_its_code() -> None:
    with pytest.raises(typer.Exit) as left:
        quickstart.step(False, "", ["pretrain", "no_such_file.yaml"])
    assert left.value.exit_code == 2


def test_ctrl_c_waits_for_the_command_to_save_and_ends_the_quick_start(tmp_path: Path) -> None:
    """Both get the signal of a terminal. The code is one that lets a first half go on."""
    began, saved = tmp_path / "began", tmp_path / "saved"
    command = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n"
        f"    time.sleep(1); pathlib.Path({str(saved)!r}).touch(); sys.exit({quickstart.STOPPED})\n"
        "signal.signal(signal.SIGINT, save)\n"
        f"pathlib.Path({str(began)!r}).touch()\n"
        "time.sleep(600)"
    )
    program = (
        "import sys; from tools.dev.quickstart import shell\n"
        f"shell([sys.executable, '-c', {command!r}], (0, {quickstart.STOPPED})); print('went on')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not began.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate()
    assert saved.exists()
    assert process.returncode != 0
    assert "was stopped and ended with code 76" in said
    assert "went on" not in said


@pytest.mark.parametrize(
    ("option", "name"), [("--scheme", "b3t"), ("--scheme", "../scheme/b2t"), ("--family", "brt")]
)
def test_an_unknown_choice_is_one_line_before_anything_is_made(option: str, name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tools.dev.quickstart", option, name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert f"={name} " in result.stderr
    assert "choose one of" in result.stderr


@pytest.mark.parametrize("family", QUICKSTARTS)
def test_a_quick_start_trains_its_family_on_the_data_it_makes(family: str) -> None:
    start, recipe = quickstart.choice(family, SCHEME)
    config = load_config(start.config, [f"+include={recipe}", *start.overrides])
    assert (config.model.family, config.name, config.model.scheme) == (family, start.name, SCHEME)
    assert [corpus.path for corpus in config.data.corpora] == [str(start.data)]
    last = start.makings(start.name)[-1]
    assert last.made.parent == start.data
    assert str(start.data) in last.arguments
    check = next(check for kind, check in CHECKS.items() if kind == config.task.samples)
    assert check.auto_class == start.auto_class
