"""Recipes of container images, as far as they can be checked without building one."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from parallel.hardware.versions import supported
from pretrain.cluster.script import SLURM

ROOT = SLURM.parent
FOLDER = SLURM / "container"
SECTIONS = ["files", "post", "environment", "runscript", "test"]
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
PACKAGES = {"model", "parallel", "pretrain", "tools", "configs", "slurm"}
FILES = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def instructions() -> list[list[str]]:
    """Of the Dockerfile, in words."""
    return [line.split() for line in text("Dockerfile").splitlines() if line and not line.startswith("#")]


def sections() -> dict[str, list[str]]:
    """Lines of the definition's sections; those before the first under ''."""
    found: dict[str, list[str]] = {"": []}
    for line in text("fathom.def").splitlines():
        if line.startswith("%"):
            found[line[1:]] = []
        elif line.strip() and not line.startswith("#"):
            found[list(found)[-1]].append(line.strip())
    return found


def test_both_recipes_make_one_image() -> None:
    header = dict(line.split(": ", 1) for line in sections()[""])
    assert list(sections()) == ["", *SECTIONS]
    assert header["Bootstrap"] == "docker"
    assert {words[0] for words in instructions()} <= INSTRUCTIONS
    assert instructions()[0] == ["FROM", header["From"]]
    copied = [name for words in instructions() if words[0] == "COPY" for name in words[1:-1]]
    assert set(copied) == PACKAGES | FILES
    assert sections()["files"] == [f"{name} /opt/source/{name}" for name in copied]
    assert all((ROOT / name).exists() for name in copied)
    run = "sh slurm/container/install.sh"
    assert [words for words in instructions() if words[0] == "RUN"] == [["RUN", *run.split()]]
    assert sections()["post"] == ["cd /opt/source", run]


def test_the_versions_are_ours() -> None:
    """Those of constraints.txt, and one Transformer Engine for images and for the tests on GPUs."""
    script = text("install.sh")
    assert script.count("--constraint constraints.txt") == 2
    assert "--build-constraint constraints.txt ." in script
    named = re.search(r"^TRANSFORMER_ENGINE=([\d.]+)$", script, re.MULTILINE)
    assert named
    workflow = (ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"transformer-engine[\w-]*==([\d.]+)", workflow)) == {named[1]}
    parts = set(re.findall(r"(transformer-engine[\w-]*)==", workflow))
    assert set(re.findall(r'"(transformer-engine[\w-]*)==\$TRANSFORMER_ENGINE"', script)) == parts
    assert isinstance(supported()["transformer-engine"], SpecifierSet)
    assert supported()["transformer-engine"].contains(named[1])


@pytest.mark.parametrize("name", ["install.sh", "apptainer-python"])
def test_scripts_are_shell(name: str) -> None:
    assert subprocess.run(["sh", "-n", FOLDER / name], capture_output=True, text=True).stderr == ""


def test_tasks_run_inside_and_the_batch_scripts_python_outside(tmp_path: Path) -> None:
    for name in ("apptainer", "python3"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}/usr/bin:/bin", "FATHOM_IMAGE": "f.sif", "FATHOM_BIND": "/shared"}

    def told(*arguments: str) -> str:
        return subprocess.run(
            [FOLDER / "apptainer-python", *arguments], env=env, capture_output=True, text=True, check=True
        ).stdout

    task = ("-m", "tools.cli", "pretrain", "/shared/runs/a run/submitted.yaml")
    inside = "apptainer exec --nv --bind /shared f.sif /opt/fathom/bin/python"
    assert told(*task) == f"{inside} {' '.join(task)}\n"
    outside = ("-m", "pretrain.cluster.supervise", "start", "/shared/runs/a")
    assert told(*outside) == f"python3 {' '.join(outside)}\n"
