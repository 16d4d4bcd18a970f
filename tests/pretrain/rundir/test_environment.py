"""Facts about a run's surroundings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cluster.code_copy import copy_code
from pretrain.rundir.environment import cpu, environment, git, gpus, versions


def test_everything_is_json_and_the_essentials_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JWT", "secret")
    monkeypatch.setenv("UNRELATED", "x")
    facts = json.loads(json.dumps(environment()))
    assert facts["variables"]["SLURM_JOB_ID"] == "17"
    assert not {"SLURM_JWT", "UNRELATED"} & set(facts["variables"])
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["command"]
    assert facts["host"]


def test_versions_need_no_import() -> None:
    script = (
        "import sys\nfrom pretrain.rundir.environment import environment\nenvironment()\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert versions()["torch"]
    assert set(versions()) >= {"fathom", "megatron-core", "deepspeed"}


def test_git_commit_and_dirt(tmp_path: Path) -> None:
    assert git(tmp_path) is None

    def run(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    run("init", "-q")
    (tmp_path / "file").write_text("1")
    run("add", "file")
    run("commit", "-q", "-m", "one")
    (tmp_path / "untracked").write_text("1")
    assert git(tmp_path) == {"commit": run("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    head = run("rev-parse", "HEAD")
    assert git(tmp_path) == {"commit": head, "dirty": True}
    # Folders inside of a checkout that are none of its files.
    # An installed package, and a submitted run's copy of the code.
    installed, copy = tmp_path / "lib", tmp_path / "runs" / "demo" / "code"
    (tmp_path / ".gitignore").write_text("lib\nruns\n")
    installed.mkdir()
    (installed / "pyproject.toml").write_text("")
    assert git(installed) is None
    copy_code(copy, tmp_path)
    copy_code(tmp_path / "runs" / "again" / "code", copy)
    run("commit", "-q", "-a", "-m", "two")
    assert git(copy) == git(tmp_path / "runs" / "again" / "code") == {"commit": head, "dirty": False}
    assert git(tmp_path) != git(copy)
    (copy / "SNAPSHOT.json").write_text("[]")  # damaged: nothing is better than something wrong
    assert git(copy) is None


def test_machine() -> None:
    found = cpu()
    assert 1 <= found["usable_cores"] <= (found["cores"] or 0)
    assert (found["memory_bytes"] or 0) > 2**28
    assert all(gpu["name"] for gpu in gpus())
