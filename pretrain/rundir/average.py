"""The mean of the weights of a run's last checkpoints, as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.folders import FolderKind, check_target, whole_folder
from model.hf.tokenizer.table import tokenizer_files
from parallel.checkpoint.folders import MANIFEST, step_folder, steps_in
from parallel.checkpoint.format import FORMAT, Fragment, Row, file_facts, manifest_text
from parallel.checkpoint.part import write_part
from parallel.checkpoint.reader import CheckpointReader
from pretrain.rundir.checkpoint_admin import checkpoints_folder
from pretrain.rundir.environment import versions

if TYPE_CHECKING:
    from torch import Tensor

FILE_BYTES = 1 << 30
"""Tensors are gathered into files of about this size, which bounds the memory that is taken."""
AVERAGE = FolderKind("a checkpoint", marker=MANIFEST, advice="name another folder", option="--out")


def average_checkpoints(run: Path, last: int, out: Path | None = None) -> tuple[Path, list[int]]:
    """Writes the mean of a run's newest `last` checkpoints; returns its folder and their steps.

    Weights are summed in fp32, from the oldest on; moments and random states are left out.
    out: the folder to write; None: `average_STEP_of_LAST` in the run's folder of checkpoints.
    Raises UserError where there are fewer checkpoints, one is damaged or of another model, or the
    folder is there already. It appears whole or not at all.
    """
    folder = checkpoints_folder(run)
    steps = steps_in(folder)
    if last < 2:
        raise UserError(f"--last {last}: a mean needs at least 2 checkpoints")
    if len(steps) < last:
        raise UserError(
            f"--last {last}: {folder} has {len(steps)} complete checkpoints: give a smaller number, "
            "or keep more in the next run (checkpoint.keep_last)"
        )
    chosen = steps[-last:]
    target = out if out is not None else folder / f"average_{chosen[-1]:08d}_of_{last}"
    check_target(target, AVERAGE)
    readers = [CheckpointReader(folder / step_folder(step)) for step in chosen]
    newest = readers[-1]
    for reader in readers[:-1]:
        if {name: reader.shape(name) for name in reader.names()} != {
            name: newest.shape(name) for name in newest.names()
        }:
            raise UserError(
                f"{reader.folder} is of another model than {newest.folder}: leave it out (--last)"
            )
    with whole_folder(target, AVERAGE) as partial:
        _write(readers, partial)
    return target, chosen


def _write(readers: Sequence[CheckpointReader], folder: Path) -> None:
    newest = readers[-1]
    files: list[Path] = []
    for number, (tensors, rows) in enumerate(_parts(readers)):
        files += write_part(folder, number, tensors, rows)
    tokenizer = newest.tokenizer_path
    if tokenizer is not None:
        for name, content in tokenizer_files(tokenizer).items():
            (folder / name).write_bytes(content)
            files.append(folder / name)
    manifest = {
        "format": FORMAT,
        "step": newest.step,
        "time": newest.manifest.time,
        "world_size": 0,
        "layout": None,
        "files": {path.name: file_facts(path).model_dump() for path in files},
        # Without moments an optimizer begins anew.
        "progress": {
            **newest.manifest.progress,
            "optimizer_step": 0,
            "averaged_steps": [reader.step for reader in readers],
        },
        "config": newest.manifest.config,
        "versions": versions(),
    }
    (folder / MANIFEST).write_text(manifest_text(manifest))


def _parts(readers: Sequence[CheckpointReader]) -> Iterator[tuple[dict[str, Tensor], list[Row]]]:
    """(flat tensors, fragment rows) of one file after another."""
    from model.parameters.shards import WHOLE

    tensors: dict[str, Tensor] = {}
    rows: list[Row] = []
    for group, name in enumerate(readers[-1].names()):
        total = readers[0].tensor(name).clone()
        for reader in readers[1:]:
            total += reader.tensor(name)
        total /= len(readers)
        # One group for each tensor: groups only say which flat tensor of a file a piece lies in.
        tensors[f"group{group}.master"] = total.reshape(-1)
        rows.append(Fragment(name, group, 0, 0, total.numel(), tuple(total.shape), WHOLE).row())
        if sum(part.nbytes for part in tensors.values()) >= FILE_BYTES:
            yield tensors, rows
            tensors, rows = {}, []
    if tensors:
        yield tensors, rows
