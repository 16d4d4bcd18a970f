"""`fathom checkpoint`, as users call it."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from tests.parallel.checkpoint.handmade import NAMES, flip, write
from tools.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3, 6 and 9 and a save that was killed two hours ago."""
    folder = tmp_path / "run"
    for step in (3, 6, 9):
        write(folder / "checkpoints", step)
    left = folder / "checkpoints" / ".step_00000012.partial"
    left.mkdir()
    os.utime(left, (1.7e9, 1.7e9))
    return folder


def fathom(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    code = 0
    try:
        main(["checkpoint", *map(str, arguments)])
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_ls(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = fathom(capsys, "ls", run)
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if "│" in line and line.split()[1].isdigit()] == [
        "3",
        "6",
        "9",
    ]
    assert out.count("latest") == 1
    assert ".step_00000012.partial" in out
    _, out, _ = fathom(capsys, "ls", run / "checkpoints", "--json")
    answer = json.loads(out)
    assert [row["step"] for row in answer["checkpoints"]] == [3, 6, 9]
    assert [row["latest"] for row in answer["checkpoints"]] == [False, False, True]
    assert answer["checkpoints"][0]["consumed_tokens"] == 384
    assert answer["checkpoints"][0]["bytes"] == sum(
        path.stat().st_size for path in (run / "checkpoints" / "step_00000003").glob("rank_*")
    )


def test_ls_shows_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_00000006" / "manifest.json").write_text("{")
    code, out, _ = fathom(capsys, "ls", run)
    assert code == 0
    assert out.count("damaged") == 1


@pytest.mark.parametrize("harm", ["gone", "short", "long"])
def test_ls_looks_at_the_files(run: Path, capsys: pytest.CaptureFixture[str], harm: str) -> None:
    file = run / "checkpoints" / "step_00000006" / "rank_00001.safetensors"
    content = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if harm == "short" else content + b"x")
    code, out, _ = fathom(capsys, "ls", run)
    assert code == 0
    assert ["damaged" in line for line in out.splitlines() if "│" in line and line.split()[1].isdigit()] == [
        False,
        True,
        False,
    ]
    _, out, _ = fathom(capsys, "ls", run, "--json")
    problems = [row["problem"] for row in json.loads(out)["checkpoints"]]
    assert problems[::2] == [None, None]
    assert problems[1].startswith(f"{file} is damaged: ")


def test_ls_says_what_was_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "step_00000012 is incomplete (killed while saving)" in fathom(capsys, "ls", run)[1].splitlines()
    shutil.rmtree(run / "checkpoints" / "step_00000009")
    _, out, _ = fathom(capsys, "ls", run)
    assert "step_00000009, the newest, is gone" in out.splitlines()
    assert "latest" not in out
    assert json.loads(fathom(capsys, "ls", run, "--json")[1])["findings"] == [
        "step_00000012 is incomplete (killed while saving)",
        "step_00000009, the newest, is gone",
    ]


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = fathom(capsys, "inspect", run, "--json", "--names")
    facts = json.loads(out)
    assert (facts["step"], facts["parameters"], facts["tensors"], facts["moments"]) == (
        9,
        sum(map(math.prod, NAMES.values())),
        len(NAMES),
        True,
    )
    assert facts["shapes"]["decoder.layers.0.mlp.linear_fc1.weight"] == [8, 4]
    _, out, _ = fathom(capsys, "inspect", run / "checkpoints" / "step_00000003")
    assert "step: 3" in out.splitlines()
    assert "parameters: 132" in out.splitlines()
    assert "decoder" not in out


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = fathom(capsys, "verify", run)
    assert (code, out) == (0, f"{run}/checkpoints/step_00000009: 4 files and 24 tensors are whole\n")
    assert fathom(capsys, "verify", run, "--quiet") == (0, "", "")
    flip(run / "checkpoints" / "step_00000009" / "rank_00000.safetensors", -1)
    code, out, err = fathom(capsys, "verify", run)
    assert (code, out) == (2, "")
    assert err.startswith("fathom: error: ")
    assert err.endswith(
        "rank_00000.safetensors is damaged: its checksum differs from the manifest. Use an older checkpoint\n"
    )
    assert err.count("\n") == 1
    assert fathom(capsys, "verify", run / "checkpoints" / "step_00000006", "--quiet") == (0, "", "")


@pytest.mark.parametrize("named", [True, False])
def test_verify_of_a_run_whose_newest_is_lost(
    run: Path, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    """Whether `latest` says which one that was or not."""
    (run / "checkpoints" / "step_00000009" / "manifest.json").unlink()
    if not named:
        (run / "checkpoints" / "latest").unlink()
    code, out, err = fathom(capsys, "verify", run)
    assert (code, out) == (2, "")
    assert "step_00000009, the newest, has lost its manifest.json; step_00000006 is whole" in err
    assert (
        "step_00000009, the newest, has lost its manifest.json" in fathom(capsys, "ls", run)[1].splitlines()
    )
    assert fathom(capsys, "verify", run / "checkpoints" / "step_00000006")[0] == 0


def test_a_damaged_pointer_is_said_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    line = (
        "`latest` is damaged (it names '\ufffd\ufffd', which is no step): "
        "step_00000009 is taken as the newest"
    )
    for command in (("verify", run), ("inspect", run)):
        code, _, err = fathom(capsys, *command)
        assert (code, err) == (0, f"fathom: {run}/checkpoints: {line}\n")
    assert line in fathom(capsys, "ls", run)[1].splitlines()
    assert fathom(capsys, "prune", run, "--keep-last", 2)[0] == 0


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    before = sorted(entry.name for entry in folder.iterdir())
    _, out, _ = fathom(capsys, "prune", run, "--keep-last", 1, "--keep-every", 3, "--dry-run")
    assert out == "would remove: .step_00000012.partial\n"
    _, out, _ = fathom(capsys, "prune", run, "--keep-last", 1, "--dry-run")
    assert out == "would remove: step 3, step 6, .step_00000012.partial\n"
    assert sorted(entry.name for entry in folder.iterdir()) == before
    (folder / ".step_00000015.partial").mkdir()
    _, out, _ = fathom(capsys, "prune", run, "--keep-last", 1, "--json")
    assert json.loads(out) == {"steps": [3, 6], "leftovers": [".step_00000012.partial"]}
    # A young left-over may be a save that is going on.
    assert sorted(entry.name for entry in folder.iterdir()) == [
        ".step_00000015.partial",
        "latest",
        "step_00000009",
    ]
    assert fathom(capsys, "verify", run, "--quiet") == (0, "", "")


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "prune"])
def test_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    options = ["--keep-last", "1"] if command == "prune" else []
    code, _, err = fathom(capsys, command, tmp_path, *options)
    assert code == 2
    assert err.startswith(f"fathom: error: {tmp_path} holds no checkpoint: give a run folder")
    assert err.count("\n") == 1


def test_prune_wants_a_run_and_a_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = fathom(capsys, "prune", run / "checkpoints" / "step_00000003", "--keep-last", 1)
    assert code == 2
    assert "give a run folder" in err
    assert fathom(capsys, "prune", run, "--keep-last", 0)[0] == 2
    assert fathom(capsys, "prune", run)[0] == 2
    assert len(list((run / "checkpoints").iterdir())) == 5
