"""What a wheel of Fathom holds, and that it works outside of the checkout."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from model import __version__
from tests.forks import shell_environment

ROOT = Path(__file__).resolve().parent.parent
CODE, DATA = ("model", "parallel", "pretrain", "tools"), ("configs", "slurm")
DATA_FILES = [
    *((folder, "**/*") for folder in DATA),
    ("model/hf/remote", "*.py"),
    ("pretrain", "**/templates/*"),
    ("tools/runs/project", "**/*"),
]
IN_AN_EMPTY_FOLDER = """
import contextlib, io, json, sys
from tools.cli import main
told = []
for line in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(line.split())
        except SystemExit as left:
            code = left.code or 0
    told.append((code, out.getvalue(), err.getvalue()))
files = {name: sys.modules[name].__file__ for name in ("model", "parallel", "pretrain", "tools")}
print(json.dumps({"told": told, "files": files}))
"""
"""Runs lines of `fathom`, one after another, and prints their codes and what they printed."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, as a build leaves folders in it.

    Warnings are errors.
    """
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in (*CODE, *DATA):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    # Left by somebody who has used the checkout.
    (source / "model" / "hf" / "remote" / "left.pyc").touch()
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", build, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        env=shell_environment() | {"PYTHONDONTWRITEBYTECODE": ""},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    warned = [line for line in said.splitlines() if "warn" in line.lower() or "***" in line]
    assert not warned
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_what_the_commands_need_and_nothing_else(unpacked: Path) -> None:
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    needed = {str(path.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("*.py")}
    needed = {name for name in needed if not name.startswith("tools/dev/")}
    for folder, pattern in DATA_FILES:
        found = {str(path.relative_to(ROOT)) for path in (ROOT / folder).glob(pattern) if path.is_file()}
        assert found
        needed |= {name for name in found if "__pycache__" not in name}
    about = f"fathom-{__version__}.dist-info"
    assert {name for name in held if not name.startswith(about)} == needed
    metadata = email.message_from_string((unpacked / about / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("fathom", __version__)
    assert "fathom = tools.cli:main" in (unpacked / about / "entry_points.txt").read_text()


def run(unpacked: Path, folder: Path, *lines: str) -> list[tuple[int, str, str]]:
    """Runs lines of the unpacked `fathom` in a folder, in one process without the checkout."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_AN_EMPTY_FOLDER, json.dumps(lines)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=shell_environment() | {"PYTHONPATH": str(unpacked)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).is_relative_to(unpacked) for file in answer["files"].values())
    return [(code, out, err) for code, out, err in answer["told"]]


def test_commands_work_in_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "gpt2_xl.yaml").write_text("include: [configs/gpt2_xl.yaml]\nname: mine\n")
    told = run(
        unpacked,
        tmp_path,
        "--help",
        "--version",
        "plan gpt2_xl --json --top 1",
        "config configs/gpt2_xl.yaml +include=configs/recipe/b2t.yaml --json",
        "config own/gpt2_xl.yaml --json",
        "init project",
        "init project",
        "submit project/run.yaml train.micro_batch_size=1 --site project/site.yaml --dry-run --json",
        "submit project/run.yaml --nodes 1 --dry-run",
    )
    assert [code for code, _, _ in told] == [0, 0, 0, 0, 0, 0, 2, 2, 2]
    helped, version, plan, config, own, init, again, submit, siteless = told
    assert "chat" in helped[1]
    assert version[1] == f"fathom {__version__}\n"
    assert json.loads(plan[1])["parameters"]["total"] > 1e9
    note = f"note: {unpacked}/configs/gpt2_xl.yaml is the shipped configuration of this name\n"
    assert (plan[2], config[2], own[2]) == (note, note, "")
    assert json.loads(config[1])["config"]["model"]["scheme"] == "b2t"
    assert json.loads(own[1])["config"]["name"] == "mine"
    assert "project/README.md says what to type next" in init[1]
    assert again[2] == (
        "fathom: error: project: a folder with files is there already; name a new or an empty one\n"
    )
    # The script is there; what it needs of the data is not.
    assert "#SBATCH --job-name=fables" in json.loads(submit[1])["script"]
    assert "`fathom init FOLDER` writes one" in siteless[2]


def test_foreign_packages_of_our_names_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("raise SystemExit(9)\n")
    done = subprocess.run(
        [sys.executable, "-c", "from tools.cli import main"],  # looks into the working folder first
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=shell_environment() | {"PYTHONPATH": os.pathsep.join((str(ROOT),))},
    )
    assert done.returncode == 2
    assert f"model ({tmp_path}/model.py)" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_stranger_trains_a_model_and_talks_to_it(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment, with what README.md of the example project says.

    The packages that Fathom needs are those of this environment: a line of a .pth file adds them,
    and not the checkout.
    """
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", str(wheel)], check=True, env=shell_environment())
    readme = (ROOT / "tools/runs/project/README.md").read_text(encoding="utf-8")
    (typed,) = re.findall(r"^```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    (dry,) = re.findall(r"^`(fathom submit .*)`\.$", readme, re.MULTILINE)
    script = [
        "fathom --version",
        "fathom init project",
        "cd project",
        "touch model.py" if sys.version_info >= (3, 11) else ":",
        typed.replace(
            "fathom chat", "printf 'A fox\\n\\n' | fathom chat --temperature 0 --max-new-tokens 24"
        ),
        "fathom pretrain run.yaml name=two train.steps=2 parallel.processes=2 train.micro_batch_size=4",
        dry,
        f"cd / && {python} -c 'import model; print(model.__file__)'",
    ]
    env = {name: value for name, value in shell_environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "-euc", "\n".join(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env | {"PATH": f"{python.parent}{os.pathsep}{env['PATH']}"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"fathom {__version__}\n" in done.stdout
    # It knows the fables by heart.
    fables = (ROOT / "tools/runs/project/text/fables.jsonl").read_text(encoding="utf-8")
    known = [line for line in done.stdout.splitlines() if line[:1] == " " and line[:20] in fables]
    assert max(map(len, known), default=0) > 20, done.stdout[-3000:]
    assert "The job would run in" in done.stdout
    assert f"{packages}/model/__init__.py" in done.stdout
