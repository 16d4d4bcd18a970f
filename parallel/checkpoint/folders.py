"""Names of checkpoint folders, the pointer to the newest, and how one is found.

Standard library only: `pretrain.cluster.supervise` uses it on nodes where nothing is installed.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from model.errors import UserError

MANIFEST = "manifest.json"
LATEST = "latest"
STEP_FOLDER = re.compile(r"^step_(\d{8,})$")
LEFTOVER = re.compile(r"^\.(step_\d{8,})(?:\.[\w.-]+)?\.(partial|replaced|pruned)$")


def step_folder(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(match[1])
        for entry in folder.iterdir()
        if (match := STEP_FOLDER.match(entry.name)) and (entry / MANIFEST).is_file()
    )


def leftovers_in(folder: Path, *, older_than_s: float = 0.0) -> list[Path]:
    """What killed saves and removals left in a `checkpoints` folder. older_than_s: only what nobody changed within so many seconds."""
    horizon = time.time() - older_than_s
    return sorted(
        entry for entry in folder.iterdir() if LEFTOVER.match(entry.name) and entry.stat().st_mtime <= horizon
    )


def findings(folder: Path) -> list[str]:
    """What killed processes left in a `checkpoints` folder, a phrase each; empty where the newest save was completed."""
    if not folder.is_dir():
        return []
    marks = [match for entry in leftovers_in(folder) if (match := LEFTOVER.match(entry.name))]
    found = [f"{match[1]} is incomplete (killed while saving)" for match in marks if match[2] == "partial"]
    pointer = folder / LATEST
    newest = pointer.read_text().strip() if pointer.is_file() else ""
    if newest and not (folder / newest / MANIFEST).is_file():
        found.append(f"{newest}, the newest, is gone")
    elif newest:
        later = [step_folder(step) for step in steps_in(folder) if newest < step_folder(step)]
        found += [f"{name} was not confirmed (killed before `{LATEST}` named it)" for name in later]
    return found


def resolve(path: Path | str) -> Path:
    """The step folder meant by a run folder, a `checkpoints` folder or a step folder. Raises UserError where there is none."""
    start = Path(path)
    if (start / MANIFEST).is_file():
        return start
    for folder in (start, start / "checkpoints"):
        steps = steps_in(folder)
        if not steps:
            continue
        pointer = folder / LATEST
        if pointer.is_file():
            named = folder / pointer.read_text().strip()
            if (named / MANIFEST).is_file():
                return named
        return folder / step_folder(steps[-1])
    raise UserError(
        f"{path} holds no checkpoint: give a run folder, its checkpoints folder, or a folder with {MANIFEST}"
    )
