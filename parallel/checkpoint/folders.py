"""Names of checkpoint folders, the pointer to the newest, and how one is found.

Standard library only: `pretrain.cluster.supervise` uses it on nodes where nothing is installed.
"""

from __future__ import annotations

import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.words import printable

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP = r"step_([0-9]{8}|[1-9][0-9]{8,14})"
STEP_FOLDER = re.compile(rf"^{_STEP}\Z")
"""One name for each step.

Eight digits, more only where the number needs them, and no more than a run can reach.
"""
LEFTOVER = re.compile(rf"^\.({_STEP})(?:\.[\w.-]+)?\.(?P<kind>partial|replaced|pruned)\Z")
POINTER_BYTES = 64
"""A pointer is the name of one folder; what is longer is none."""


def step_folder(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending.

    Links to somewhere else do not count.
    """
    return sorted(
        step for step, entry in _entries(folder) if not entry.is_symlink() and (entry / MANIFEST).is_file()
    )


def leftovers_in(folder: Path, *, older_than_s: float = 0.0) -> list[Path]:
    """What killed saves and removals left in a `checkpoints` folder.

    older_than_s: only what nobody changed within so many seconds.
    """
    horizon = time.time() - older_than_s
    return sorted(
        entry
        for entry in folder.iterdir()
        if LEFTOVER.match(entry.name) and entry.lstat().st_mtime <= horizon
    )


@dataclass(frozen=True)
class Pointer:
    """What `latest` says."""

    name: str = ""
    """The folder it names; empty where it names none."""
    problem: str = ""
    """Why it is not followed, a phrase; empty where there is nothing wrong."""


def read_pointer(folder: Path) -> Pointer:
    """`latest` of a `checkpoints` folder; a damaged one names nothing, as a missing one does."""
    try:
        # Not to hang at a pipe, nor to follow a link.
        handle = os.open(folder / LATEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return Pointer()
    except OSError as error:
        what = "it is a link" if (folder / LATEST).is_symlink() else error.strerror
        return Pointer(problem=f"`{LATEST}` cannot be read ({what})")
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return Pointer(problem=f"`{LATEST}` is damaged (no regular file)")
        content = os.read(handle, POINTER_BYTES + 1)
    finally:
        os.close(handle)
    name = content.decode(errors="replace").strip()
    if len(content) <= POINTER_BYTES and STEP_FOLDER.match(name):
        return Pointer(name)
    return Pointer(problem=f"`{LATEST}` is damaged (it names {printable(name, 40)!r}, which is no step)")


def newest_in(folder: Path) -> Path | None:
    """The newest checkpoint; None where there is none.

    It is the one that `latest` names, or else the highest complete step.
    """
    steps = steps_in(folder)
    if not steps:
        return None
    named = STEP_FOLDER.match(read_pointer(folder).name)
    return folder / step_folder(int(named[1]) if named and int(named[1]) in steps else steps[-1])


def lost_in(folder: Path) -> str:
    """What is missing of a checkpoint newer than all complete ones, a phrase; empty for nothing."""
    highest = (steps_in(folder) or [-1])[-1]
    pointer = read_pointer(folder)
    named = STEP_FOLDER.match(pointer.name)
    if named and int(named[1]) not in steps_in(folder):
        return f"{pointer.name}, the newest, {_fate(folder / pointer.name)}"
    broken = next((entry for step, entry in reversed(_entries(folder)) if step > highest), None)
    return f"{broken.name}, the newest, {_fate(broken)}" if broken is not None else ""


def findings(folder: Path) -> list[str]:
    """What is odd about a `checkpoints` folder, a phrase each.

    Empty where the newest save was completed.
    """
    if not folder.is_dir():
        return []
    marks = [match for entry in leftovers_in(folder) if (match := LEFTOVER.match(entry.name))]
    found = [
        f"{match[1]} is incomplete (killed while saving)" for match in marks if match["kind"] == "partial"
    ]
    pointer, lost, newest = read_pointer(folder), lost_in(folder), newest_in(folder)
    if pointer.problem:
        found.append(pointer.problem + (f": {newest.name} is taken as the newest" if newest else ""))
    if lost:
        found.append(lost)
    elif newest is not None:
        later = [step for step in steps_in(folder) if step > step_of(newest)]
        found += [
            f"{step_folder(step)} was not confirmed (killed before `{LATEST}` named it)" for step in later
        ]
    return found


def step_of(folder: Path) -> int:
    """The step that a folder's name says, -1 where it says none."""
    match = STEP_FOLDER.match(folder.name)
    return int(match[1]) if match else -1


def resolve(path: Path | str) -> Path:
    """The step folder meant by a run folder, a `checkpoints` folder or a step folder.

    Raises UserError where there is none.
    """
    start = Path(path)
    if (start / MANIFEST).is_file():
        return start
    for folder in (start, start / "checkpoints"):
        newest = newest_in(folder)
        if newest is not None:
            return newest
    raise UserError(
        f"{path} holds no checkpoint: give a run folder, its checkpoints folder, or a folder with {MANIFEST}"
    )


def _entries(folder: Path) -> list[tuple[int, Path]]:
    """Everything in a folder that has the name of a step, ascending."""
    if not folder.is_dir():
        return []
    return sorted((step_of(entry), entry) for entry in folder.iterdir() if STEP_FOLDER.match(entry.name))


def _fate(entry: Path) -> str:
    if entry.is_symlink():
        return "is a link, which is not followed"
    return f"has lost its {MANIFEST}" if entry.is_dir() else "is gone"
