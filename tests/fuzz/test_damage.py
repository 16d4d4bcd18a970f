"""Damaged results of Fathom: every command that reads them answers with 0, or with 2 and one line, and changes nothing."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.artefacts import COMMANDS, files, leftovers, seal_again, walk
from tests.fuzz.damage import damages
from tests.fuzz.running import listing, run

QUICK, LONG = 150, 1000
SHOWN = 12


def case(sound: Path, folder: Path, number: int) -> tuple[str, str, int]:
    """Damages one file of a copy and runs one command that reads it. Returns what was done, what is wrong with the answer, and the exit code.

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
    what = f"case {number}: {path.relative_to(folder)} {said}{', sealed again' * resealed}: fathom {' '.join(command.arguments)}"
    shutil.rmtree(folder)
    return what, wrong, done.code


def try_cases(sound: Path, folder: Path, numbers: range) -> None:
    codes: Counter[int] = Counter()
    failures = []
    for number in numbers:
        what, wrong, code = case(sound, folder / str(number), number)
        codes[code] += 1
        if wrong:
            failures.append(f"{what}\n    {wrong}")
    print(
        f"{len(numbers)} damaged inputs: {codes[2]} refused in one line, {codes[0]} read, {len(failures)} wrong"
    )
    assert not failures, f"{len(failures)} of {len(numbers)}:\n" + "\n".join(failures[:SHOWN])


def test_damage(sound: Path, tmp_path: Path) -> None:
    try_cases(sound, tmp_path, range(QUICK))


@pytest.mark.slow
def test_much_damage(sound: Path, tmp_path: Path) -> None:
    try_cases(sound, tmp_path, range(QUICK, QUICK + LONG))
