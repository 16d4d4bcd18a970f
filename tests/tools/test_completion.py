"""Completion in shells, whose commands are loaded when they are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import ROOT, shell_environment


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a user with an empty home, and `fathom` on the path."""
    home = tmp_path_factory.mktemp("home")
    program = home / "bin" / "fathom"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m tools.cli "$@"\n')
    program.chmod(0o755)
    variables = shell_environment()
    path = f"{program.parent}{os.pathsep}{variables['PATH']}"
    return variables | {"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}


def bash(env: dict[str, str], script: str) -> str:
    done = subprocess.run(["bash", "-c", script], env=env, cwd=env["HOME"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash_completes_after_the_installation(env: dict[str, str]) -> None:
    assert "completion installed in" in bash(env, "fathom --install-completion; true")
    (script,) = Path(env["HOME"]).glob(".bash_completions/*")
    assert str(script) in (Path(env["HOME"]) / ".bashrc").read_text()
    found = {}
    for words in ("fathom ch", "fathom checkpoint in", "fathom generate --max", "fathom data "):
        given = words.split(" ")
        asked = f"source {script}; COMP_WORDS=({words}); COMP_CWORD={len(given) - 1}; "
        found[words] = bash(env, f'{asked}_fathom_completion fathom; echo "${{COMPREPLY[@]}}"').split()
    assert found == {
        "fathom ch": ["checkpoint", "chat"],
        "fathom checkpoint in": ["inspect"],
        "fathom generate --max": ["--max-new-tokens"],
        "fathom data ": ["prepare", "inspect", "verify"],
    }


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("zsh", {"_TYPER_COMPLETE_ARGS": "fathom depth-d"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "fathom depth-d", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_other_shells_are_answered(env: dict[str, str], shell: str, variables: dict[str, str]) -> None:
    told = bash(env | variables | {"_FATHOM_COMPLETE": f"complete_{shell}"}, "fathom")
    assert "depth-duel" in told
    assert "Train several depth schemes" in told
