"""Saving: written beside, synced, confirmed by every process, renamed; only then does `latest` move."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from model.files import atomic_write_text, sync_folder
from parallel.checkpoint.format import FORMAT, LATEST, MANIFEST, file_facts, leftovers_in, manifest_text, step_folder, steps_in
from parallel.checkpoint.fragments import flat_state, is_writer, owned_fragments
from parallel.engine import Engine


def save(
    engine: Engine, folder: Path, step: int, *, progress: dict[str, Any], config: dict[str, Any], versions: dict[str, Any], extra: dict[str, bytes]
) -> float:
    """Saves a checkpoint of `step` under `folder`; returns the seconds it took. Collective: every process calls it.

    progress: position in the data and whatever else the run needs to continue; config: resolved configuration; extra: small files kept with it
    (the tokenizer), by name. Raises OSError on every process when any of them could not write, with the old state intact.
    """
    begin = time.monotonic()
    rank = dist.get_rank()
    partial = folder / f".{step_folder(step)}.partial"
    try:
        _agree(_attempt(folder, lambda: _make_partial(partial)) if rank == 0 else "")
        report: dict[str, Any] = {}
        problem = _attempt(partial, lambda: report.update(_write_rank(engine, partial, rank)))
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (problem, report))
        _raise_first([text for text, _ in reports])
        manifest = {
            "format": FORMAT,
            "step": step,
            "time": time.time(),
            "world_size": dist.get_world_size(),
            "layout": engine.topology.layout.summary(),
            "files": {name: facts for _, files in reports for name, facts in files.items()},
            "progress": progress,
            "config": config,
            "versions": versions,
        }
        _agree(_attempt(folder, lambda: _publish(partial, folder, step, manifest, extra)) if rank == 0 else "")
    except OSError:
        # On a full disk a torn copy would only make things worse.
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return time.monotonic() - begin


def _attempt(place: Path, action: Callable[[], None]) -> str:
    """Runs an action; returns what went wrong in one line, or nothing. Any failure must reach all ranks, or they would wait for this one."""
    try:
        action()
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split()) or type(error).__name__
        return f"{place}: {reason}"
    return ""


def _make_partial(partial: Path) -> None:
    if partial.parent.is_dir():
        remove(leftovers_in(partial.parent))
    partial.mkdir(parents=True)


def _agree(problem: str) -> None:
    """Raises OSError everywhere when rank 0 met a problem."""
    box = [problem]
    dist.broadcast_object_list(box, src=0)
    _raise_first(box)


def _raise_first(problems: list[str]) -> None:
    for rank, problem in enumerate(problems):
        if problem:
            raise OSError(f"checkpoint not saved, rank {rank}: {problem}")


def _write_rank(engine: Engine, folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Writes this process's files; returns size and hash of each."""
    writes = [is_writer(engine, group) for group in range(len(engine.groups))]
    tensors: dict[str, Tensor] = {}
    for group in range(len(engine.groups)):
        if writes[group]:
            for kind, tensor in flat_state(engine, group).items():
                tensors[f"group{group}.{kind}"] = tensor.cpu().contiguous()
    tensors |= {f"rng.{name}": state for name, state in rng_states().items()}
    name = f"rank_{rank:05d}"
    data, index = folder / f"{name}.safetensors", folder / f"{name}.json"
    save_file(tensors, data)
    rows = [fragment.to_json() for _, fragment in owned_fragments(engine) if writes[fragment.group]]
    index.write_text(json.dumps({"fragments": rows}))
    for path in (data, index):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    return {path.name: file_facts(path) for path in (data, index)}


def _publish(partial: Path, folder: Path, step: int, manifest: dict[str, Any], extra: dict[str, bytes]) -> None:
    for name, content in extra.items():
        (partial / name).write_bytes(content)
        with (partial / name).open("rb+") as file:
            os.fsync(file.fileno())
        manifest["files"][name] = file_facts(partial / name)
    atomic_write_text(partial / MANIFEST, manifest_text(manifest))
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
    """Removes folders with what is in them; one that cannot be removed stays without a word, it does no harm."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def doomed_steps(folder: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Steps that `prune` would remove."""
    steps = steps_in(folder)
    pointer = folder / LATEST
    # After a crash `latest` may name an older step than the newest folder; the run goes on from it, so it stays.
    current = pointer.read_text().strip() if pointer.is_file() else ""
    kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
    return [step for step in steps if step not in kept and step_folder(step) != current]


def prune(folder: Path, *, keep_last: int, keep_every: int) -> list[int]:
    """Removes old checkpoints; returns their steps. keep_last: newest ones that stay, at least 1; keep_every: multiples of it stay, 0 for none."""
    doomed = doomed_steps(folder, keep_last=keep_last, keep_every=keep_every)
    for step in doomed:
        # Renamed first: a half-removed folder must not look like a checkpoint.
        grave = folder / f".{step_folder(step)}.pruned"
        shutil.rmtree(grave, ignore_errors=True)
        (folder / step_folder(step)).rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
    return doomed


def rng_states() -> dict[str, Tensor]:
    """Random states of this process, as byte tensors by generator name."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Restores what `rng_states` gave."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix("tracker."): state for name, state in states.items() if name.startswith("tracker.")}
    if tracked:
        get_cuda_rng_tracker().set_states(tracked)
