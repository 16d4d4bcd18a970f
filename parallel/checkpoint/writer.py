"""Saving: written beside, synced, confirmed by every process, renamed.

Only then does `latest` move.
`take` copies what a process owns, `write` brings such a copy to disk; `save` is both.
`parallel.checkpoint.background` writes while training goes on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from model.files import atomic_write_text, sync_folder
from model.records import Record
from parallel.checkpoint.errors import SaveError
from parallel.checkpoint.folders import LATEST, MANIFEST, leftovers_in, read_pointer, step_folder, steps_in
from parallel.checkpoint.format import FORMAT, FileFacts, Row, file_facts, manifest_text
from parallel.checkpoint.fragments import flat_state, is_writer, owned_fragments
from parallel.checkpoint.part import write_part
from parallel.checkpoint.random_state import rng_states
from parallel.engine.engine import Engine
from parallel.exchange import agree, gather_records, told_as_it_is

if TYPE_CHECKING:
    from typing_extensions import Unpack

Fence = Callable[[], None]
told_as_it_is(SaveError)


class Report(Record):
    """What one process has written."""

    files: dict[str, FileFacts]
    """Facts of each file by name."""


@dataclass(frozen=True)
class Snapshot:
    """What one process writes for a step."""

    step: int
    tensors: dict[str, Tensor]
    """On the host."""
    rows: list[Row]
    """Its index."""
    facts: Mapping[str, object]
    """The manifest without files."""
    extra: dict[str, bytes]
    """Small files by name."""


class Content(TypedDict):
    """What whoever saves puts into a checkpoint."""

    progress: Mapping[str, object]
    """Position in the data and whatever else the run needs to continue."""
    config: Mapping[str, object]
    """The resolved configuration."""
    versions: Mapping[str, str | None]
    """Of packages."""
    extra: dict[str, bytes]
    """Small files kept with it (the tokenizer), by name."""


def take_snapshot(
    engine: Engine,
    step: int,
    *,
    buffers: dict[str, Tensor] | None = None,
    **content: Unpack[Content],
) -> Snapshot:
    """What this process owns at `step`.

    buffers: host memory to copy into, kept by the caller from save to save.
    Without it the snapshot may share memory with the engine,
    which must not step before the snapshot is written.
    """
    writes = [is_writer(engine, group) for group in range(len(engine.groups))]
    tensors: dict[str, Tensor] = {}
    for group in range(len(engine.groups)):
        if writes[group]:
            for kind, tensor in flat_state(engine, group).items():
                name = f"group{group}.{kind}"
                tensors[name] = (
                    tensor.cpu().contiguous() if buffers is None else _copied(tensor, name, buffers)
                )
    if buffers is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    tensors |= {f"rng.{name}": state for name, state in rng_states().items()}
    rows = [fragment.row() for _, fragment in owned_fragments(engine) if writes[fragment.group]]
    facts = {
        "format": FORMAT,
        "step": step,
        "time": time.time(),
        "world_size": dist.get_world_size(),
        "layout": engine.topology.layout.summary(),
        "progress": content["progress"],
        "config": content["config"],
        "versions": content["versions"],
    }
    return Snapshot(step, tensors, rows, facts, content["extra"])


def _copied(tensor: Tensor, name: str, buffers: dict[str, Tensor]) -> Tensor:
    buffer = buffers.get(name)
    if buffer is None or buffer.numel() != tensor.numel():
        buffer = buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return buffer.copy_(tensor, non_blocking=True)


def save(engine: Engine, folder: Path, step: int, **content: Unpack[Content]) -> float:
    """Saves a checkpoint of `step` under `folder`; returns the seconds it took.

    Collective: every process calls it.
    Raises SaveError on every process when any of them could not write, with the old state intact.
    """
    begin = time.monotonic()
    write(take_snapshot(engine, step, **content), folder)
    return time.monotonic() - begin


def write(
    snapshot: Snapshot,
    folder: Path,
    *,
    group: dist.ProcessGroup | None = None,
    fence: Fence | None = None,
    tag: str = "",
) -> int:
    """Writes a snapshot under `folder` and makes it the newest. Collective over `group`.

    Returns its bytes over all processes.
    fence: called by process 0 before anything is touched and before the checkpoint becomes visible;
    what it raises is raised on every process.
    tag: distinguishes the half-written folders of different starts of a run.
    Raises SaveError on every process when any of them could not write, with the old state intact.
    """
    rank, step = dist.get_rank(), snapshot.step
    partial = folder / f".{step_folder(step)}{'.' if tag else ''}{tag}.partial"

    def fenced(action: Callable[[], None]) -> Exception | None:
        try:
            if fence is not None:
                fence()
        except Exception as error:
            return error
        return _attempt(folder, action)

    try:
        agree(fenced(lambda: _make_partial(partial)) if rank == 0 else None, group)
        own: dict[str, FileFacts] = {}
        agree(_attempt(partial, lambda: own.update(_write_rank(snapshot, partial, rank))), group)
        reports = gather_records(Report(files=own), group)
        files = {name: facts for report in reports for name, facts in report.files.items()}
        agree(fenced(lambda: _publish(partial, folder, snapshot, files)) if rank == 0 else None, group)
    except Exception:
        # On a full disk a torn copy would only make things worse.
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return sum(facts.bytes for facts in files.values())


def _attempt(place: Path, action: Callable[[], None]) -> Exception | None:
    """Runs an action; returns what went wrong in one line, or nothing.

    Any failure must reach all ranks, or they would wait for this one.
    """
    try:
        action()
    except Exception as error:
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else " ".join(str(error).split()) or type(error).__name__
        )
        return SaveError(f"checkpoint not saved, rank {dist.get_rank()}: {place}: {reason}")
    return None


def _make_partial(partial: Path) -> None:
    if partial.parent.is_dir():
        remove(leftovers_in(partial.parent))
        for torn in partial.parent.glob(f".{LATEST}.*.tmp"):
            torn.unlink(missing_ok=True)
    partial.mkdir(parents=True)


def _write_rank(snapshot: Snapshot, folder: Path, rank: int) -> dict[str, FileFacts]:
    """Writes this process's files; returns size and hash of each."""
    paths = write_part(folder, rank, snapshot.tensors, snapshot.rows)
    for path in paths:
        _sync(path)
    return {path.name: file_facts(path) for path in paths}


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(partial: Path, folder: Path, snapshot: Snapshot, files: dict[str, FileFacts]) -> None:
    """Makes the half-written folder the newest checkpoint.

    files: what all processes have written; the small files are added to it.
    """
    step = snapshot.step
    for name, content in snapshot.extra.items():
        (partial / name).write_bytes(content)
        _sync(partial / name)
        files[name] = file_facts(partial / name)
    written = {name: facts.model_dump() for name, facts in files.items()}
    atomic_write_text(partial / MANIFEST, manifest_text({**snapshot.facts, "files": written}))
    final = folder / step_folder(step)
    replaced = folder / f".{step_folder(step)}.replaced"
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(folder)
    atomic_write_text(folder / LATEST, step_folder(step) + "\n")
    shutil.rmtree(replaced, ignore_errors=True)


def remove(folders: Iterable[Path]) -> None:
    """Removes folders with what is in them.

    One that cannot be removed stays without a word, it does no harm.
    """
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def doomed_steps(folder: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Steps that `prune` would remove."""
    steps = steps_in(folder)
    # After a crash `latest` may name an older step than the newest folder.
    # The run goes on from that older step, so it stays.
    current = read_pointer(folder).name
    kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
    return [step for step in steps if step not in kept and step_folder(step) != current]


def prune(folder: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Removes old checkpoints; returns their steps.

    keep_last: newest ones that stay, at least 1.
    keep_every: multiples of it stay, 0 for none.
    """
    doomed = doomed_steps(folder, keep_last=keep_last, keep_every=keep_every)
    for step in doomed:
        # Renamed first: a half-removed folder must not look like a checkpoint.
        grave = folder / f".{step_folder(step)}.pruned"
        shutil.rmtree(grave, ignore_errors=True)
        (folder / step_folder(step)).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
    return doomed
