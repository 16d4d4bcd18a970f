"""Options of every command with values that make no sense: 0, or 2 and one line, and no computation that nobody can wait for."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuzz.artefacts import COMMANDS, RUN
from tests.fuzz.running import run
from tools import cli

BASES = (
    *dict.fromkeys(command.arguments for command in COMMANDS if command.arguments[0] != "pretrain"),
    ("data", "prepare", "texts", "--tokenizer", "tokenizer.model", "--out", "new_data", "--workers", "1"),
    ("tokenizer", "train", "texts", "--out", "new.model", "--vocab-size", "300"),
    ("depth-duel", "c.yaml", "--out", "duel", "--report-only"),
    ("pretrain", "c.yaml", "name=other", "train.steps=1"),
    ("status", RUN),
)
VALUES = (
    "0",
    "-1",
    "-1e-30",
    "1000000000000",
    "1" + "0" * 30,
    "9" * 5000,
    "nan",
    "inf",
    "1e308",
    "1:30",
    "x",
    "",
)
HARD = ("n" * 5000, "\x1b[2J", "/nowhere/at/all", "/etc/passwd", "/dev/full", "a,b,,c", "１", "..")
SHOWN = 12


def options(base: tuple[str, ...]) -> list[str]:
    """The options of a command that take a value."""
    rows = {row.name: row for row in cli.COMMANDS}
    command: Any = cli.load(rows[base[0]])
    if hasattr(command, "commands"):
        command = command.commands[base[1]]
    return [
        parameter.opts[0]
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_flag
    ]


CASES = [(base, option, value) for base in BASES for option in options(base) for value in (*VALUES, *HARD)]


def try_cases(sound: Path, folder: Path, cases: list[tuple[tuple[str, ...], str, str]]) -> None:
    """Runs each in a copy of its own, as some of them write."""
    codes: Counter[int] = Counter()
    failures = []
    for number, (base, option, value) in enumerate(cases):
        world = folder / str(number)
        shutil.copytree(sound, world, symlinks=True)
        done = run(*base, f"{option}={value}", cwd=world)
        shutil.rmtree(world)
        codes[done.code] += 1
        if done.wrong:
            failures.append(f"fathom {' '.join(base)} {option}={value[:40]!r}\n    {done.wrong}")
    print(
        f"{len(cases)} senseless options: {codes[2]} refused in one line, {codes[0]} taken, {len(failures)} wrong"
    )
    assert not failures, f"{len(failures)} of {len(cases)}:\n" + "\n".join(failures[:SHOWN])


def test_options(sound: Path, tmp_path: Path) -> None:
    try_cases(sound, tmp_path, Random(0).sample(CASES, 50))


@pytest.mark.slow
def test_all_options(sound: Path, tmp_path: Path) -> None:
    try_cases(sound, tmp_path, CASES)
