"""The command line: quick help, errors in one line, exit codes."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from tools import cli

HEAVY = {"torch", "pydantic", "omegaconf", "numpy", "transformers", "datasets", "matplotlib"}
FAKE = '''
"""A command that does as it is told."""
from model.errors import UserError

def command(what: str) -> None:
    """Do it."""
    if what == "user":
        raise UserError("train.steps=0:\\n  wrong")
    if what == "open":
        open("no/such/file")
    if what == "bug":
        raise ValueError("a bug")
    print("did", what)
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of three rows: a real module, one that does not exist, and one without the attribute."""
    (tmp_path / "fake_command.py").write_text(FAKE)
    rows = (
        cli.Row("do", "fake_command:command", "Do it.", "Test"),
        cli.Row("gone", "not_there:command", "Not there.", "Test"),
        cli.Row("bad", "fake_command:app", "Bad.", "Test"),
    )
    monkeypatch.setattr(cli, "COMMANDS", rows)
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(arguments))
    return int(leaving.value.code or 0)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom tools.cli import main\ntry:\n    main(['--help'])\n"
        "except SystemExit as leaving:\n    assert not leaving.code\nprint('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = set(done.stdout.partition("MODULES")[2].split())
    assert not HEAVY & modules
    assert "tools.config" not in modules
    assert "config" in done.stdout


def test_only_commands_of_this_checkout_are_listed(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "Do it." in shown
    assert "gone" not in shown
    assert run("gone") == 2


def test_a_command_runs(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("do", "this") == 0
    assert capsys.readouterr().out == "did this\n"


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("user", "fathom: error: train.steps=0: wrong\n"),
        ("open", "fathom: error: no/such/file: No such file or directory\n"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(
    fake: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str, line: str
) -> None:
    monkeypatch.delenv("FATHOM_DEBUG", raising=False)
    assert run("do", what) == 2
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_DEBUG", "1")
    with pytest.raises(ValueError, match="train.steps=0"):
        cli.main(["do", "user"])


def test_a_bug_is_not_dressed_as_a_mistake(fake: None) -> None:
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["do", "bug"])


def test_a_typing_mistake_gets_a_suggestion(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doo") == 2
    assert "Did you mean 'do'" in capsys.readouterr().err


def test_a_row_that_names_nothing_says_so(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bad") == 2
    assert capsys.readouterr().err == "fathom: error: command bad: fake_command has no app\n"


def test_interrupt_leaves_with_130(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(
        "import time\n\ndef command() -> None:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    script = (
        f"from pathlib import Path\nfrom tools import cli\ncli.ROOT = Path({str(tmp_path)!r})\n"
        "cli.COMMANDS = (cli.Row('wait', 'waiting:command', 'Wait.', 'Test'),)\ncli.main(['wait'])"
    )
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).resolve().parents[2])))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; m.version('fathom')"],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("fathom is not installed in this environment")
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("fathom ")


def test_every_command_module_has_a_row() -> None:
    """A module of tools/ that defines `app` or `command` and stands in no row would be unreachable."""
    rows = {row.target for row in cli.COMMANDS}
    for path in sorted((cli.ROOT / "tools").glob("*.py")):
        defined = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if path.stem != "cli" and defined & {"app", "command"}:
            assert any(f"tools.{path.stem}:{name}" in rows for name in defined), (
                f"{path.name} has no row in tools/cli.py"
            )


@pytest.mark.parametrize("row", [row for row in cli.COMMANDS if row.available], ids=lambda row: row.name)
def test_every_row_loads_and_explains_itself(row: cli.Row, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.load(row)
    assert command.name == row.name
    assert run(row.name, "--help") == 0
    assert "Usage: fathom " + row.name in capsys.readouterr().out


def test_an_app_with_one_command_of_another_name_is_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grouped.py").write_text(
        "import typer\napp = typer.Typer()\n@app.command()\ndef train() -> None:\n    print('trained')\n"
    )
    (tmp_path / "single.py").write_text(
        "import typer\napp = typer.Typer()\n@app.command()\ndef depth_duel() -> None:\n    print('won')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    group = cli.load(cli.Row("tokenizer", "grouped:app", "", ""))
    single = cli.load(cli.Row("depth-duel", "single:app", "", ""))
    assert isinstance(group, typer.core.TyperGroup)
    assert list(group.commands) == ["train"]
    assert isinstance(single, typer.core.TyperCommand)
    assert not single.params
