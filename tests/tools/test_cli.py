"""The command line: quick help, errors in one line, exit codes."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from model import __version__
from tools import cli

HEAVY = {"torch", "pydantic", "yaml", "numpy", "transformers", "datasets", "matplotlib"}
FAKE = '''
"""A command that does as it is told."""
import errno, os, subprocess
import model
import yaml
from model.errors import UserError
from model.files import atomic_write_text

def command(what: str) -> None:
    """Do it."""
    if what == "user":
        raise UserError("train.steps=0:\\n  wrong")
    if what == "open":
        open("no/such/file")
    if what == "folder":
        open("/tmp", "w")
    if what == "long":
        open("n" * 300, "w")
    if what == "below a file":
        open("/dev/null/x")
    if what == "escape":
        open("\\x1b[2J\\n")
    if what == "full":
        with open("/dev/full", "w") as file:
            file.write("x")
    if what == "full and named":
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        try:
            atomic_write_text("result.txt", "x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if what == "read-only":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "report.html")
    if what == "rust":
        raise Exception("I/O error: No space left on device (os error 28)")
    if what == "bug":
        raise ValueError("a bug")
    if what == "bug: no file":
        raise FileNotFoundError("a bug")
    if what == "bug: our file":
        open(os.path.join(os.path.dirname(model.__file__), "a bug"))
    if what == "bug: a library's file":
        open(os.path.join(os.path.dirname(yaml.__file__), "a bug"))
    if what == "bug: a program":
        subprocess.run(["a bug"])
    if what == "bug: a socket":
        raise ConnectionRefusedError(errno.ECONNREFUSED, "a bug")
    if what == "bug: a pipe":
        raise BrokenPipeError(errno.EPIPE, "a bug")
    if what == "bug: a descriptor":
        os.fsync(os.open("/dev/null", os.O_RDONLY) + 1000)
    print("did", what)
'''


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of three rows.

    A real module, one that does not exist, and one without the attribute.
    """
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
    assert "tools.runs.config" not in modules
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
        ("user", "train.steps=0: wrong"),
        ("open", "no/such/file: No such file or directory: check the path"),
        ("folder", "/tmp: Is a directory, where a file is meant: check the path"),
        ("long", "n" * 199 + "…: File name too long: shorten it"),
        ("below a file", "/dev/null/x: Not a directory: a part of this path is a file; check the path"),
        ("escape", "\\x1b[2J\\n: No such file or directory: check the path"),
        ("full", "No space left on device: make room, or name a place on another disk"),
        ("full and named", "result.txt: File too large: the file system or `ulimit -f` allows no more"),
        ("read-only", "report.html: Read-only file system: name a place that can be written"),
        ("rust", "No space left on device: make room, or name a place on another disk"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(
    fake: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    what: str,
    line: str,
) -> None:
    monkeypatch.delenv("FATHOM_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run("do", what) == 2
    assert capsys.readouterr().err == f"fathom: error: {line}\n"
    assert not (tmp_path / "result.txt").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "",
        ": no file",
        ": our file",
        ": a library's file",
        ": a program",
        ": a socket",
        ": a pipe",
        ": a descriptor",
    ],
)
def test_a_bug_is_not_dressed_as_a_mistake(fake: None, kind: str) -> None:
    with pytest.raises(Exception, match="a bug|Bad file descriptor"):
        cli.main(["do", f"bug{kind}"])


def test_debug_shows_the_traceback(fake: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_DEBUG", "1")
    with pytest.raises(ValueError, match="train.steps=0"):
        cli.main(["do", "user"])


def test_a_typing_mistake_gets_a_suggestion(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doo") == 2
    assert (
        capsys.readouterr().err
        == "fathom: error: No such command 'doo'. Did you mean 'do'? (fathom --help)\n"
    )
    assert run("do") == 2
    assert capsys.readouterr().err == "fathom: error: Missing argument 'what'. (fathom do --help)\n"


@pytest.mark.parametrize(
    ("command", "arguments", "line"),
    [
        ("plan", ["--tokens", "nan"], "--tokens nan must be at most 1000000000000000000"),
        ("plan", ["--tokens=-inf"], "--tokens -inf must be at least 1"),
        ("plan", ["--price-per-gpu-hour", "\n"], "--price-per-gpu-hour \\n must be a number"),
        ("plan", ["--top", "1.5"], "--top 1.5 must be a whole number"),
        ("data prepare", ["--split-by", "foo"], "--split-by: 'foo' is not one of 'document', 'file'"),
        ("data inspect", ["--split", "foo"], "--split: 'foo' is not one of 'train', 'validation', 'test'"),
        ("eval", ["--split", "foo"], "--split: 'foo' is not one of 'train', 'validation', 'test'"),
        ("depth-use", ["--split", "foo"], "--split: 'foo' is not one of 'train', 'validation', 'test'"),
    ],
)
def test_a_wrong_value_is_shown_as_it_was_typed(
    command: str, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command.split(), "quickstart", *arguments) == 2
    assert capsys.readouterr().err == f"fathom: error: {line} (fathom {command} --help)\n"


def test_a_row_that_names_nothing_says_so(fake: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bad") == 2
    assert capsys.readouterr().err == "fathom: error: command bad: fake_command has no app\n"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (" | head -c 10 >/dev/null", 1, ""),
        (
            " >/dev/full",
            2,
            "fathom: error: standard output: No space left on device: "
            "make room, or name a place on another disk\n",
        ),
        (" >&-", 0, ""),
    ],
)
@pytest.mark.parametrize("options", ["", " --json"])
def test_output_that_goes_nowhere(options: str, end: str, code: int, said: str) -> None:
    arguments = f"config configs/quickstart.yaml{options}"
    script = f"set -o pipefail; {sys.executable} -c 'from tools.cli import main; main()' {arguments}{end}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=cli.ROOT)
    assert done.stderr == said
    # A short answer fits into the pipe before its reader has gone.
    assert done.returncode == code or (code == 1 and done.returncode == 0)


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    script = (
        f"cd {tmp_path} && rmdir {tmp_path} && "
        f"{sys.executable} -c 'from tools.cli import main; main()' config quickstart"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(cli.ROOT)},
    )
    assert (done.returncode, done.stderr) == (
        2,
        "fathom: error: the working folder is gone: change to another one\n",
    )


def test_interrupt_leaves_with_130(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(
        "import time\n\ndef command() -> None:\n    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    # A shell's background jobs ignore the signal, and so does what they start.
    script = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
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
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"fathom {__version__}\n"


def test_every_command_module_has_a_row() -> None:
    """A module of a room of tools/ that defines `app` or `command` would be unreachable without."""
    rows = {row.target for row in cli.COMMANDS}
    rooms = {target.split(".")[1] for target in rows}
    paths = [path for room in rooms for path in sorted((cli.ROOT / "tools" / room).glob("*.py"))]
    assert len(paths) > len(rows)
    for path in paths:
        defined = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if defined & {"app", "command"}:
            module = f"tools.{path.parent.name}.{path.stem}"
            assert any(f"{module}:{name}" in rows for name in defined), (
                f"{path.name} has no row in tools/cli.py"
            )


@pytest.mark.parametrize("row", [row for row in cli.COMMANDS if row.available], ids=lambda row: row.name)
def test_every_row_loads_and_explains_itself(row: cli.Row, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.load_command(row)
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
    group = cli.load_command(cli.Row("tokenizer", "grouped:app", "", ""))
    single = cli.load_command(cli.Row("depth-duel", "single:app", "", ""))
    assert isinstance(group, typer.core.TyperGroup)
    assert list(group.commands) == ["train"]
    assert isinstance(single, typer.core.TyperCommand)
    assert not single.params
