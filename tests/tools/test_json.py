"""What scripts read: `--json` prints one document on standard output, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.small import small_config, small_data, small_trainer
from tools import cli

WITHOUT = {
    "pretrain": "its outcome is its exit code and the run's state.json and metrics.jsonl",
    "board": "a server; `fathom status --json` has the same",
    "chat": "a talk; `fathom generate --json` has one answer",
}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its whole name."""
    for row in cli.COMMANDS:
        command: Any = cli.load_command(row)
        if not hasattr(command, "commands"):
            yield row.name, command
        else:
            yield from ((f"{row.name} {name}", inner) for name, inner in command.commands.items())


def test_every_command_that_tells_something_has_it() -> None:
    lacking = {name for name, one in commands() if not any("--json" in option.opts for option in one.params)}
    assert lacking == set(WITHOUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and a run on it in `runs/small`."""
    folder = tmp_path_factory.mktemp("small")
    data = small_data(folder)
    small_trainer(small_config(data, folder / "runs", 2, num_layers=2, scheme="pre_ln")).run()
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "data inspect {data}",
        "data verify {data}",
        "checkpoint ls {run}",
        "checkpoint inspect {run}",
        "checkpoint verify {run}",
        "checkpoint prune {run} --keep-last 1 --dry-run",
        "generate {run} --max-new-tokens 3 --prompt a",
        "eval {run} --samples 2",
        "plan gpt2_xl --top 1",
        "design --params 100M --layers 12 --tokens 1e9 --out {out}",
        "config gpt2_xl",
        "init {out}",
    ],
)
def test_it_is_one_document(
    line: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = {"data": folder / "data", "run": folder / "runs" / "small"}
    given = [part.format(**places, out=tmp_path / "out") for part in line.split()]
    with pytest.raises(SystemExit) as left:
        cli.main([*given, "--json"])
    assert not left.value.code
    assert json.loads(capfd.readouterr().out)
