"""What is looked at before a run writes anything, and what a refused start takes away again."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from model.errors import UserError
from model.parameters.size import parameter_count
from parallel.checkpoint.folders import resolve, steps_in
from parallel.checkpoint.format import read_manifest
from pretrain.config.schema import RunConfig
from pretrain.rundir.lock import LOCK_FILE, InUseError, owned
from pretrain.rundir.state import CONTROL, PREFLIGHT_FILE, STATE_FILE

CHECKPOINT_BYTES = 12
"""Of one parameter: weights and two moments of Adam in fp32."""
TRACES = {LOCK_FILE, CONTROL, PREFLIGHT_FILE, STATE_FILE, "config.yaml", "environment.json"}
"""What a start writes before its first step."""


def check_before_start(config: RunConfig) -> None:
    """Raises UserError where the run has no checkpoint to begin from, or no room for its own."""
    run_dir = Path(config.runs_dir) / config.name
    check_source(config, run_dir)
    lack, _ = lack_of_room(config, run_dir)
    if lack:
        raise UserError(lack)


def check_source(config: RunConfig, run_dir: Path) -> None:
    """Raises UserError where `checkpoint.load` names no checkpoint, and the run has none of its own
    yet.
    """
    source = config.checkpoint.load
    if source is None or steps_in(run_dir / "checkpoints"):
        return
    try:
        read_manifest(resolve(source))
    except UserError as error:
        raise UserError(f"checkpoint.load: {error}") from None


def lack_of_room(config: RunConfig, run_dir: Path) -> tuple[str, int]:
    """Why the file system has no room for one checkpoint of the run, empty where it has; and its
    free bytes.

    The run directory need not be there yet. Raises OSError as the file system does.
    """
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    disk = shutil.disk_usage(there)
    free = disk.free
    if not disk.total:  # /proc, say, where the folder cannot be made, which is said when it is tried
        return "", free
    needed = CHECKPOINT_BYTES * parameter_count(config.model)["total"]
    if free >= needed:
        return "", free
    sizes = f"{free / 2**30:.1f} GiB free, one checkpoint takes about {needed / 2**30:.1f} GiB"
    return f"{run_dir} has {sizes}: make room, or set runs_dir", free


class FirstStart:
    """Remembers which folders a start makes, so that one that was refused leaves nothing behind."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir.absolute()
        self.made = [folder for folder in (self.run_dir, *self.run_dir.parents) if not folder.exists()]

    def take_back(self) -> None:
        """Removes the run directory where this start made it, and it has nothing but what a start
        writes at once.
        """
        if self.run_dir not in self.made or not self.run_dir.is_dir():
            return
        with contextlib.suppress(OSError, InUseError), owned(self.run_dir, 0):
            if {entry.name for entry in self.run_dir.iterdir()} <= TRACES:
                shutil.rmtree(self.run_dir)
                for folder in self.made[1:]:
                    folder.rmdir()  # ends at the first that holds something else
