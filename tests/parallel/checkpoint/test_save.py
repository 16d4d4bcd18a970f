"""Saving fails as a whole or succeeds as a whole, on all ranks.

The order of writing leaves nothing half-done to be found.
"""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from model.errors import UserError
from parallel.checkpoint import writer
from parallel.checkpoint.background import Saver
from parallel.checkpoint.folders import LATEST, MANIFEST, leftovers_in, resolve, steps_in
from parallel.checkpoint.fragments import flat_state
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint
from parallel.engine.engine import Engine
from tests.distributed import Group, gather, launch
from tests.parallel.checkpoint.handmade import flip
from tests.parallel.checkpoint.states import bring, equal, keep, state
from tests.parallel.training import engine_of, given, run_config, train

CONFIG = run_config()
CONTENT: dict[str, Any] = {"progress": {"optimizer_step": 1}, "config": {}, "versions": {}, "extra": {}}


def said(action: Any) -> str:
    """The message of the error that an action ends with, or nothing."""
    try:
        action()
    except (OSError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def two_ranks() -> dict[str, Any]:
    """Runs inside two ranks."""
    folder = Path(gather(tempfile.mkdtemp(prefix="fathom-save-"))[0])
    engine = engine_of(CONFIG)
    train(CONFIG, engine, 0, 1)
    found: dict[str, Any] = {"order": order(engine, folder / "order")}
    found["blocked"] = blocked(engine, folder / "blocked")
    found["full"] = full_disk(engine, folder / "full")
    found["background"] = in_the_background(engine, folder / "background")
    found["fenced"] = fenced(engine, folder / "fenced")
    found["pointer"] = pointer_fails(engine, folder / "pointer")
    found["twice"] = saved_twice(engine, folder / "twice")
    found["damaged"] = damaged(engine, folder / "damaged")
    found["unreadable"] = unreadable(engine, folder / "damaged")
    found["deeper"] = other_model(folder / "damaged")
    return found


def order(engine: Engine, folder: Path) -> list[str]:
    """What rank 0 makes final, in order."""
    done: list[str] = []
    write, rename = writer.atomic_write_text, Path.rename

    def noting_write(path: Path, text: str) -> None:
        done.append(path.name)
        write(path, text)

    def noting_rename(self: Path, target: Path) -> Path:
        present = sorted(entry.name for entry in self.iterdir())
        done.append(f"{self.name} -> {target.name} with {', '.join(present)}")
        return rename(self, target)

    writer.atomic_write_text, Path.rename = noting_write, noting_rename  # type: ignore[assignment, method-assign]
    try:
        keep(engine, CONFIG, folder, 1)
    finally:
        writer.atomic_write_text, Path.rename = write, rename  # type: ignore[method-assign]
    return done


def blocked(engine: Engine, folder: Path) -> dict[str, Any]:
    """A file stands where the folder should be: root could write to a read-only folder."""
    if dist.get_rank() == 0:
        folder.write_text("in the way")
    dist.barrier()
    return {"said": gather(said(lambda: keep(engine, CONFIG, folder, 1))), "left": folder.read_text()}


def full_disk(engine: Engine, folder: Path) -> dict[str, Any]:
    """Rank 1 may write no file above a few kilobytes."""
    keep(engine, CONFIG, folder, 1)
    before = {path.name: path.read_bytes() for path in resolve(folder).iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    message = said(lambda: keep(engine, CONFIG, folder, 2))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    dist.barrier()
    found = {
        "said": gather(message),
        "steps": steps_in(folder),
        "leftovers": [entry.name for entry in leftovers_in(folder)],
        "intact": {path.name: path.read_bytes() for path in resolve(folder).iterdir()} == before,
    }
    dist.barrier()
    keep(engine, CONFIG, folder, 2)
    return found | {"then": steps_in(folder)}


def in_the_background(engine: Engine, folder: Path) -> dict[str, Any]:
    """A save that goes well while the weights change under it, and one that meets a full disk.

    The full disk is on rank 1.
    """
    saver = Saver(folder, tag="12.0")
    saved = state(engine)
    first = saver.save(engine, 1, asynchronous=True, **CONTENT)
    with torch.no_grad():
        for group in range(len(engine.groups)):
            flat_state(engine, group)["master"].mul_(0.5)
    facts = saver.wait()
    found: dict[str, Any] = {
        "first": first,
        "facts": facts is not None
        and (facts.step, facts.bytes > 0, 0 < facts.stall_seconds <= facts.seconds),
    }
    bring(engine, folder)
    found["saved"] = gather(equal(state(engine), saved))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    saver.save(engine, 2, asynchronous=True, **CONTENT)
    while not saver.done:
        time.sleep(0.01)
    found["failed"] = gather(saver.failed)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    found["said"] = gather(said(saver.wait))
    found |= {"steps": steps_in(folder), "leftovers": leftovers_in(folder)}
    dist.barrier()
    saver.save(engine, 2, asynchronous=True, **CONTENT)
    saver.wait()
    saver.close()
    return found | {"then": steps_in(folder)}


def fenced(engine: Engine, folder: Path) -> dict[str, Any]:
    """A newer start takes the run over while rank 0 of this one waits for the others' bytes."""
    asked: list[int] = []

    def fence() -> None:
        asked.append(1)
        if len(asked) == 4:
            raise UserError("taken over")

    saver = Saver(folder, fence=fence)
    saver.save(engine, 1, asynchronous=False, **CONTENT)
    found = {"said": gather(said(lambda: saver.save(engine, 2, asynchronous=False, **CONTENT)))}
    saver.close()
    return found | {
        "left": sorted(entry.name for entry in folder.iterdir()),
        "newest": (folder / LATEST).read_text(),
    }


def pointer_fails(engine: Engine, folder: Path) -> dict[str, Any]:
    """The disk is full when only `latest` is missing."""
    keep(engine, CONFIG, folder, 1)
    write = writer.atomic_write_text

    def failing(path: Path, text: str) -> None:
        if path.name == LATEST:
            raise OSError(28, "No space left on device")
        write(path, text)

    writer.atomic_write_text = failing  # type: ignore[assignment]
    message = said(lambda: keep(engine, CONFIG, folder, 2))
    writer.atomic_write_text = write
    found = {"said": gather(message), "newest": resolve(folder).name}
    dist.barrier()
    return found


def saved_twice(engine: Engine, folder: Path) -> dict[str, Any]:
    """The same step again, over what crashed saves left behind."""
    keep(engine, CONFIG, folder, 1)
    if dist.get_rank() == 0:
        for name in (".step_00000001.replaced", ".step_00000001.partial", ".step_00000007.pruned"):
            (folder / name).mkdir()
            (folder / name / "half").write_text("")
    dist.barrier()
    # Other weights after the same number of steps.
    with torch.no_grad():
        for named in engine.parameters:
            named.parameter.mul_(0.5)
        for group in range(len(engine.groups)):
            flat_state(engine, group)["master"].mul_(0.5)
    keep(engine, CONFIG, folder, 1)
    second = state(engine)
    train(CONFIG, engine, 2, 3)
    bring(engine, folder)
    return {
        "second": all(gather(equal(state(engine), second))),
        "left": sorted(entry.name for entry in folder.iterdir()),
    }


def damaged(engine: Engine, folder: Path) -> dict[str, Any]:
    """A byte of rank 1's file is flipped: both ranks refuse, and the engine is as it was."""
    keep(engine, CONFIG, folder, 1)
    path = resolve(folder) / "rank_00001.safetensors"
    if dist.get_rank() == 0:
        flip(path, path.stat().st_size // 2)
    dist.barrier()
    before = state(engine)
    found = {
        "said": gather(said(lambda: bring(engine, folder))),
        "unchanged": gather(equal(state(engine), before)),
        "path": str(path),
    }
    if dist.get_rank() == 0:
        flip(path, path.stat().st_size // 2)
    dist.barrier()
    return found


def unreadable(engine: Engine, folder: Path) -> list[str]:
    """The disk of rank 1 fails when the weights are read, after all was found whole."""
    part = CheckpointReader.part

    def failing(self: CheckpointReader, *args: Any) -> torch.Tensor:
        if dist.get_rank() == 1:
            raise OSError(5, "Input/output error")
        return part(self, *args)

    CheckpointReader.part = failing  # type: ignore[assignment, method-assign]
    try:
        return gather(said(lambda: bring(engine, folder)))
    finally:
        CheckpointReader.part = part  # type: ignore[method-assign]


def other_model(folder: Path) -> list[str]:
    """A model with more layers, of which the checkpoint lacks some, all in the second stage.

    Every rank must be told.
    """
    return gather(said(lambda: bring(engine_of(run_config(given(num_layers=6), given(pipeline=2))), folder)))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return launch(Group(2, two_ranks))[0][0]


def test_latest_moves_last(found: dict[str, Any]) -> None:
    files = "rank_00000.json, rank_00000.safetensors, rank_00001.json, rank_00001.safetensors"
    assert found["order"] == [
        MANIFEST,
        f".step_00000001.partial -> step_00000001 with {MANIFEST}, {files}, tokenizer.model",
        LATEST,
    ]


def test_a_folder_that_cannot_be_made(found: dict[str, Any]) -> None:
    first, second = found["blocked"]["said"]
    assert first == second
    assert first.startswith("SaveError: checkpoint not saved, rank 0: ")
    assert "\n" not in first
    assert found["blocked"]["left"] == "in the way"


def test_full_disk_on_one_rank(found: dict[str, Any]) -> None:
    first, second = found["full"]["said"]
    assert first == second
    assert first.startswith("SaveError: checkpoint not saved, rank 1: ")
    assert "\n" not in first
    assert found["full"]["steps"] == [1]
    assert found["full"]["leftovers"] == []
    assert found["full"]["intact"]
    assert found["full"]["then"] == [1, 2]


def test_saving_in_the_background(found: dict[str, Any]) -> None:
    background = found["background"]
    assert background["first"] is None
    assert background["facts"] == (1, True, True)
    assert background["saved"] == [True, True]
    assert background["failed"] == [True, True]
    first, second = background["said"]
    assert first == second
    assert first.startswith("SaveError: checkpoint not saved, rank 1: ")
    assert (background["steps"], background["leftovers"], background["then"]) == ([1], [], [1, 2])


def test_a_start_that_was_replaced_publishes_nothing(found: dict[str, Any]) -> None:
    assert found["fenced"] == {
        "said": ["UserError: taken over"] * 2,
        "left": [LATEST, "step_00000001"],
        "newest": "step_00000001\n",
    }


def test_a_pointer_that_cannot_move(found: dict[str, Any]) -> None:
    assert found["pointer"]["newest"] == "step_00000001"
    assert all(message.endswith("No space left on device") for message in found["pointer"]["said"])


def test_a_step_saved_again_over_left_overs(found: dict[str, Any]) -> None:
    assert found["twice"] == {"second": True, "left": [LATEST, "step_00000001"]}


def test_damage_is_told_on_every_rank_before_anything_changes(found: dict[str, Any]) -> None:
    message = (
        f"UserError: {found['damaged']['path']} is damaged: its checksum differs from the manifest. "
        "Use an older checkpoint"
    )
    assert found["damaged"]["said"] == [message, message]
    assert found["damaged"]["unchanged"] == [True, True]


def test_what_no_one_expected_is_told_on_every_rank_too(found: dict[str, Any]) -> None:
    error = "OSError: [Errno 5] Input/output error"
    assert found["unreadable"] == [f"PeerError: rank 1: {error}", error]


def test_another_model_is_told_on_every_rank(found: dict[str, Any]) -> None:
    first, second = found["deeper"]
    assert first == second
    assert "holds no parameter decoder.layers.4." in first
    assert "it is a checkpoint of another model" in first


def test_reading_needs_no_process_group(tmp_path: Path) -> None:
    launch(Group(1, one_saved, (str(tmp_path),)))
    # In a process of its own: this one may have been made a rank by another test.
    code = (
        "import sys; import torch.distributed as dist; from parallel.checkpoint.reader import "
        "CheckpointReader, open_checkpoint\n"
        "reader = open_checkpoint(sys.argv[1]); reader.verify(); list(reader.weights().values()); "
        "sys.exit(dist.is_initialized())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    reader = open_checkpoint(tmp_path)
    reader.verify()
    assert {stat.S_IMODE(path.stat().st_mode) for path in reader.folder.iterdir()} == {0o640}
    assert reader.tokenizer_path is not None
    assert "tokenizer.model" in reader.manifest.files
    assert all(torch.isfinite(tensor).all() for tensor in reader.weights().values())
    flip(reader.tokenizer_path, 0)
    with pytest.raises(ValueError, match="tokenizer.model is damaged"):
        open_checkpoint(tmp_path).verify()


def one_saved(folder: str) -> None:
    """Runs inside one rank."""
    os.umask(0o027)
    keep(engine_of(CONFIG), CONFIG, Path(folder), 0)
