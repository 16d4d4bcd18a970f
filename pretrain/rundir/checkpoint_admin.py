"""What `fathom checkpoint` does: look at checkpoints, check them and remove old ones.

Needs no process group.
"""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import TypedDict

from model.errors import UserError
from model.files import inside
from parallel.checkpoint.audit import check_tensors, saved_model
from parallel.checkpoint.folders import (
    MANIFEST,
    Pointer,
    findings,
    leftovers_in,
    lost_in,
    read_pointer,
    step_folder,
    steps_in,
)
from parallel.checkpoint.format import Manifest, read_manifest, saved_progress
from parallel.checkpoint.reader import open_checkpoint
from parallel.checkpoint.writer import doomed_steps, prune
from parallel.checkpoint.writer import remove as remove_folders

LEFTOVER_AGE_S = 3600.0  # a younger one may be a save that is going on


class _Found(TypedDict):
    step: int
    folder: str
    latest: bool
    problem: str | None
    """Why it cannot be read."""


class CheckpointRow(_Found, total=False):
    """One checkpoint of a run. One that cannot be read has no more than `_Found`."""

    time: float | None
    """Seconds since 1970."""
    bytes: int
    layout: dict[str, int] | None
    processes: int
    consumed_tokens: int | None


class _Facts(TypedDict):
    folder: str
    step: int
    time: str | None
    layout: dict[str, int] | None
    processes: int
    progress: dict[str, object]
    parameters: int
    tensors: int
    moments: bool
    files: dict[str, int]
    model: object
    versions: dict[str, str | None]


class CheckpointFacts(_Facts, total=False):
    """What a checkpoint holds."""

    shapes: dict[str, list[int]]
    """Of every parameter, where they were asked for."""


class Verified(TypedDict):
    """A checkpoint that was read whole."""

    folder: str
    step: int
    files: int
    tensors: int


class Removed(TypedDict):
    """What was removed."""

    steps: list[int]
    leftovers: list[str]
    """Names of folders."""


def checkpoints_folder(path: Path) -> Path:
    """The folder with the step folders, given itself or its run folder.

    Raises UserError where there is none.
    """
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (
            steps_in(folder) or read_pointer(folder) != Pointer() or leftovers_in(folder)
        ):
            return folder
    raise UserError(f"{path} holds no checkpoint: give a run folder or its checkpoints folder")


def list_checkpoints(path: Path) -> list[CheckpointRow]:
    """One row for each checkpoint.

    Sizes of files are compared with the manifest; `verify` reads them.

    Raises UserError where there is none.
    """
    folder = checkpoints_folder(path)
    latest = read_pointer(folder).name
    rows = []
    for step in steps_in(folder):
        row: CheckpointRow = {
            "step": step,
            "folder": str(folder / step_folder(step)),
            "latest": step_folder(step) == latest,
            "problem": None,
        }
        try:
            manifest = read_manifest(folder / step_folder(step))
            row["problem"] = _missing(folder / step_folder(step), manifest)
            row |= {
                "time": manifest.time,
                "bytes": sum(facts.bytes for facts in manifest.files.values()),
                "layout": manifest.layout,
                "processes": manifest.world_size,
                "consumed_tokens": saved_progress(folder, manifest).consumed_tokens,
            }
        except UserError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def remarks(path: Path) -> list[str]:
    """What killed saves and lost folders mean for the newest checkpoint, a phrase each."""
    return findings(checkpoints_folder(path))


def leftovers(path: Path) -> list[str]:
    """Names of what killed saves left behind."""
    return [entry.name for entry in leftovers_in(checkpoints_folder(path))]


def checkpoint_facts(path: Path, *, names: bool) -> CheckpointFacts:
    """What a checkpoint holds.

    names: with the shape of every parameter.

    Raises UserError where it cannot be read.
    """
    reader = open_checkpoint(path)
    manifest = reader.manifest
    shapes = {name: list(reader.shape(name)) for name in reader.names()}
    facts: CheckpointFacts = {
        "folder": str(reader.folder),
        "step": reader.step,
        "time": local_time(manifest.time),
        "layout": manifest.layout,
        "processes": manifest.world_size,
        "progress": manifest.progress,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "tensors": len(shapes),
        "moments": reader.trained,
        "files": {name: facts.bytes for name, facts in manifest.files.items()},
        "model": reader.sections.model,
        "versions": manifest.versions,
    }
    if names:
        facts["shapes"] = shapes
    return facts


def verify_checkpoint(path: Path) -> Verified:
    """Reads a checkpoint whole.

    Checksums of all files, every element of every tensor, and whether they are those of its model.

    Raises UserError naming what is wrong.
    Also for a run whose newest checkpoint is not there, after the one before was found whole.
    """
    reader = open_checkpoint(path)
    reader.verify()
    saved = saved_model(reader) if reader.sections.model else None
    tensors = check_tensors(reader, saved)
    lost = lost_in(reader.folder.parent) if reader.folder != path else ""
    if lost:
        raise UserError(
            f"{reader.folder.parent}: {lost}; {reader.folder.name} is whole: "
            "restore the former, or name the latter to check it alone"
        )
    return {
        "folder": str(reader.folder),
        "step": reader.step,
        "files": len(reader.manifest.files),
        "tensors": tensors,
    }


def clean(path: Path, *, keep_last: int, keep_every: int, dry_run: bool) -> Removed:
    """Removes old checkpoints and old left-overs; returns what was, or would be, removed.

    Raises UserError where there is nothing to look at.
    """
    folder = checkpoints_folder(path)
    if (path / MANIFEST).is_file():
        raise UserError(f"{path} is one checkpoint: give its run folder")
    steps, old = (
        doomed_steps(folder, keep_last=keep_last, keep_every=keep_every),
        leftovers_in(folder, older_than_s=LEFTOVER_AGE_S),
    )
    if not dry_run:
        prune(folder, keep_last=keep_last, keep_every=keep_every)
        remove_folders(old)
    return {"steps": steps, "leftovers": [entry.name for entry in old]}


def local_time(seconds: float | None) -> str | None:
    """Time of day for people, in the machine's zone, from seconds since 1970."""
    return (
        None
        if seconds is None
        else datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
    )


def _missing(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is not there or has another size than the manifest says."""
    for name, facts in manifest.files.items():
        try:
            size = inside(folder, name).stat().st_size
        except OSError as error:
            return f"{folder / name} is damaged: {error.strerror}"
        if size != facts.bytes:
            return f"{folder / name} is damaged: it has {size} bytes, and {facts.bytes} in the manifest"
    return None
