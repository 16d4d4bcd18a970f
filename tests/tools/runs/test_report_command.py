"""`fathom report`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from model.errors import UserError
from tools.runs.report import command

app = typer.Typer()
app.command()(command)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    records = [
        {"event": "start", "time": 0.0, "step": 0},
        {"event": "train", "time": 2.0, "step": 1, "loss": 2.0, "tokens": 8, "tokens_per_s": 4.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_writes_the_page_and_says_where(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(run)])
    assert (result.exit_code, result.output) == (0, f"report: {run / 'report.html'}\n")
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    result = CliRunner().invoke(
        app, [str(run), "--out", str(tmp_path / "elsewhere" / "page.html"), "--quiet"]
    )
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "elsewhere" / "page.html").exists()


def test_a_page_that_cannot_be_written_is_not_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.report.run_report.render", lambda found: pytest.fail("it was drawn"))
    refused = CliRunner().invoke(app, [str(run), "--out", str(run)])
    assert str(refused.exception) == f"--out {run} is no regular file: name a file to write to"


def test_json_has_the_numbers(run: Path) -> None:
    found = json.loads(CliRunner().invoke(app, [str(run), "--json"]).output)
    assert found["report"] == str(run / "report.html")
    assert (
        found["step"],
        found["train_loss"],
        found["tokens_per_s"],
        found["validation_loss"],
        found["mfu"],
    ) == (1, 2.0, 4.0, None, None)


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(tmp_path / "nothing")])
    assert isinstance(result.exception, UserError)


def test_the_module_is_light() -> None:
    heavy = (
        "import sys, tools.runs.report; "
        "print([name for name in ('torch', 'matplotlib', 'numpy', 'yaml', 'pydantic') "
        "if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
