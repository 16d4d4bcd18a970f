"""What the doctor says about imagined machines, and about this one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from parallel.hardware.precision import Machine
from pretrain.cluster import doctor
from pretrain.cluster.doctor import Check, training_possible
from tools.runs.doctor import command

app = typer.Typer()
app.command()(command)
Usage = namedtuple("Usage", "total used free")
H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0), "2.11.0", "")


def only(checks: Iterable[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_small_shared_memory_and_few_open_files_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1 << 20))
    monkeypatch.setattr(doctor, "gpus", lambda: [{"name": "x", "driver": "1"}] * 8)
    monkeypatch.setattr(
        doctor, "cpu", lambda: {"model": "x", "cores": 16, "usable_cores": 15, "memory_bytes": None}
    )
    found = list(doctor.limits())
    assert only(found, "/dev/shm").state == "warning"
    assert "--shm-size=16g" in only(found, "/dev/shm").advice
    assert only(found, "open files").advice.endswith("ulimit -n 65536")
    assert only(found, "CPU").state == "warning"
    assert only(found, "disk").state == "warning"
    assert training_possible(found)


def test_the_site_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch, site = tmp_path / "sbatch", tmp_path / "site.yaml"
    sbatch.write_text("#!/bin/sh\necho slurm 24.05\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("FATHOM_SITE", raising=False)
    assert only(doctor.slurm(), "site file").state == "note"
    monkeypatch.setenv("FATHOM_SITE", str(site))
    for text, state, found in (
        ("gpus_per_node: 8", "ok", str(site)),
        ("gpus_per_node: x", "warning", "gpus_per_node='x'"),
    ):
        site.write_text(text)
        check = only(doctor.slurm(), "site file")
        assert (check.state, found in check.found) == (state, True)


def test_fp8_recipes_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "this_machine", lambda: H100)
    check = only(doctor.transformer_engine(), "FP8")
    assert (check.found, check.advice) == ("blockwise, tensorwise, delayed", "not here: mxfp8")
    monkeypatch.setattr(doctor, "this_machine", lambda: Machine(H100.gpu, H100.capability, H100.cuda))
    (check,) = doctor.transformer_engine()
    assert (check.state, check.found) == ("warning", "is not installed")
    assert "pip install --no-build-isolation '.[te]'" in check.advice


def test_a_gpu_that_pytorch_cannot_use_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "this_machine", Machine)
    monkeypatch.setattr(doctor, "gpus", lambda: [{"name": "NVIDIA L4", "driver": "470.1"}])
    (check,) = doctor.devices()
    assert check.state == "warning"
    assert "1 x NVIDIA L4, not usable" in check.found


def test_a_package_outside_its_range_rules_training_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if not doctor.supported():
        pytest.skip(
            "supported ranges are not known here: Fathom is not installed, and Python is older than 3.11"
        )
    monkeypatch.setattr(
        doctor, "installed", lambda name: {"torch": "2.4.0", "deepspeed": None}.get(name, "99999")
    )
    monkeypatch.setattr(doctor, "PROBE", "pass")
    found = list(doctor.packages())
    supported = doctor.supported()["torch"]
    assert "2.4.0" not in supported
    assert f"pip install 'torch{supported}'" in only(found, "torch").advice
    assert only(found, "deepspeed").found == "not installed"
    assert not training_possible(found)


def test_broken_imports_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE", "import no_such_package")
    check = only(doctor.packages(), "imports")
    assert check.state == "failure"
    assert "No module named 'no_such_package'" in check.found


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd_machine() -> Iterable[Check]:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "CHECKS", (odd_machine,))
    (check,) = doctor.examine()
    assert (check.name, check.state, check.found) == (
        "odd machine",
        "warning",
        "could not be checked: OSError: no such device",
    )


def test_the_command_says_it_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "CHECKS", (lambda: iter([Check("a", "ok", "1"), Check("b", "warning", "2", "do this")]),)
    )
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert "-> do this" in result.output
    assert "Training is possible" in result.output
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Check("a", "failure", "1")]),))
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == 1
    assert json.loads(result.output) == {
        "training_possible": False,
        "checks": [{"name": "a", "state": "failure", "found": "1", "advice": ""}],
    }


def test_training_is_possible_where_these_tests_run() -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "doctor", "--json"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["training_possible"] is True
    assert {"Python", "imports", "/dev/shm", "open files", "C++ compiler"} <= {
        check["name"] for check in report["checks"]
    }
