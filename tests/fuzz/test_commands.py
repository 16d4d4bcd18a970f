"""Commands on damaged results of Fathom and with senseless options.

Each answers with 0, or with 2 and one line.
It changes nothing that it only reads, and nobody waits for it.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuzz.artefacts import COMMANDS, RUN, files, leftovers, seal_again, walk
from tests.fuzz.damage import damages
from tests.running import listing, run
from tools import cli

QUICK, LONG, QUICK_OPTIONS = 120, 1000, 40
SHOWN = 12
"""Failures that are printed whole."""
Count = Callable[[str, Any], None]

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
HARD = ("n" * 5000, "\x1b[2J", "nowhere/at/all", "../outside", "pipe", "a,b,,c", "１", "..")
"""Names lie in the folder of the case or beside it.

Some options say where to write, and root may write anywhere.
"""


def case(sound: Path, folder: Path, number: int) -> tuple[str, str, int]:
    """Damages one file of a copy and runs one command that reads it.

    Returns what was done, what is wrong with the answer, and the exit code.

    number: the same one is the same case for ever.
    """
    random = Random(number)
    shutil.copytree(sound, folder, symlinks=True)
    command = random.choices(COMMANDS, [one.share for one in COMMANDS])[0]
    path = random.choice(files(folder, command))
    said = random.choice(damages(path))(path, random)
    resealed = (
        path.parent.name.startswith("step_") and path.is_file() and random.random() < 0.5 and seal_again(path)
    )
    before = listing(folder)
    done = run(*command.arguments, cwd=folder)
    wrong = done.wrong or leftovers(before, listing(folder), command, done)
    if not wrong and not command.words and (marks := set(walk(done.out))):
        wrong = f"control characters {marks} on stdout"
    what = (
        f"case {number}: {path.relative_to(folder)} {said}{', sealed again' * resealed}: "
        f"fathom {' '.join(command.arguments)}"
    )
    shutil.rmtree(folder)
    return what, wrong, done.code


def options(base: tuple[str, ...]) -> list[str]:
    """The options of a command that take a value."""
    rows = {row.name: row for row in cli.COMMANDS}
    command: Any = cli.load_command(rows[base[0]])
    if hasattr(command, "commands"):
        command = command.commands[base[1]]
    return [
        parameter.opts[0]
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.is_flag
    ]


CASES = [(base, option, value) for base in BASES for option in options(base) for value in (*VALUES, *HARD)]


def option(sound: Path, folder: Path, number: int) -> tuple[str, str, int]:
    """Runs one command with one senseless option. Returns as `case`."""
    base, name, value = CASES[number]
    shutil.copytree(sound, folder, symlinks=True)
    os.mkfifo(folder / "pipe")
    (folder.parent / "outside").write_text("somebody's")
    done = run(*base, f"{name}={value}", cwd=folder)
    shutil.rmtree(folder)
    return f"fathom {' '.join(base)} {name}={value[:40]!r}", done.wrong, done.code


Attempt = Callable[[Path, Path, int], tuple[str, str, int]]


def try_all(attempt: Attempt, numbers: Sequence[int], sound: Path, folder: Path, record: Count) -> None:
    codes: Counter[int] = Counter()
    failures = []
    for number in numbers:
        what, wrong, code = attempt(sound, folder / str(number), number)
        codes[code] += 1
        if wrong:
            failures.append(f"{what}\n    {wrong}")
    record(
        "counts",
        f"{len(numbers)} tried: {codes[2]} refused in one line, {codes[0]} taken, {len(failures)} wrong",
    )
    assert not failures, f"{len(failures)} of {len(numbers)}:\n" + "\n".join(failures[:SHOWN])


def test_damage(sound: Path, tmp_path: Path, record_property: Count) -> None:
    try_all(case, range(QUICK), sound, tmp_path, record_property)


def test_options(sound: Path, tmp_path: Path, record_property: Count) -> None:
    numbers = Random(0).sample(range(len(CASES)), QUICK_OPTIONS)
    try_all(option, numbers, sound, tmp_path, record_property)


@pytest.mark.slow
def test_much_damage(sound: Path, tmp_path: Path, record_property: Count) -> None:
    try_all(case, range(QUICK, QUICK + LONG), sound, tmp_path, record_property)


@pytest.mark.slow
def test_all_options(sound: Path, tmp_path: Path, record_property: Count) -> None:
    try_all(option, range(len(CASES)), sound, tmp_path, record_property)
