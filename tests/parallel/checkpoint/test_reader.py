"""Reading without a process group: whole tensors, ranges, one clear line for every damage."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from model.errors import UserError
from model.parameters.shards import WHOLE, Shard, take
from parallel.checkpoint.folders import LATEST, MANIFEST, findings, resolve, step_folder, steps_in
from parallel.checkpoint.format import STATE_KINDS
from parallel.checkpoint.loader import check_model
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint
from parallel.checkpoint.writer import doomed_steps
from tests.parallel.checkpoint.handmade import FC1, FC2, NAMES, flip, reseal, tensors, write
from tests.rows import local_parameter


def read_all(path: Path) -> None:
    reader = open_checkpoint(path)
    reader.verify()
    for name in reader.names():
        for kind in STATE_KINDS:
            reader.tensor(name, kind)


def test_whole_tensors_are_put_together(tmp_path: Path) -> None:
    write(tmp_path)
    reader = open_checkpoint(tmp_path)
    assert set(reader.names()) == set(NAMES)
    assert reader.step == 3
    for kind, whole in tensors().items():
        for name, tensor in whole.items():
            assert reader.shape(name) == NAMES[name]
            assert reader.tensor(name, kind).equal(tensor)
    assert {name: tensor.shape for name, tensor in reader.weights().items()} == NAMES
    with pytest.raises(KeyError):
        reader.weights()["nothing"]


@pytest.mark.parametrize(
    "shard",
    [WHOLE, *(Shard(0, index, 2, 2) for index in (0, 1)), *(Shard(0, index, 4, 2) for index in range(4))],
    ids=str,
)
def test_ranges_of_any_part(tmp_path: Path, shard: Shard) -> None:
    write(tmp_path)
    reader = open_checkpoint(tmp_path)
    expected = take(tensors()["exp_avg"][FC1], shard).flatten()
    for start in range(expected.numel()):
        for length in (0, 1, expected.numel() - start):
            assert reader.part(FC1, "exp_avg", shard, start, length).equal(expected[start : start + length])


def test_ranges_over_files(tmp_path: Path) -> None:
    write(tmp_path)
    reader = open_checkpoint(tmp_path)
    expected = tensors()["master"][FC2].flatten()
    for start in range(16):
        for stop in range(start, 17):
            assert reader.part(FC2, "master", WHOLE, start, stop - start).equal(expected[start:stop])


def test_unknown_parameter_and_other_shapes(tmp_path: Path) -> None:
    write(tmp_path)
    reader = open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="holds no parameter decoder.layers.1.*another model"):
        reader.tensor("decoder.layers.1.mlp.linear_fc1.weight")
    check_model(reader, [local_parameter(FC1, nn.Parameter(torch.empty(2, 4)), Shard(0, 3, 4, 2))])
    with pytest.raises(
        UserError, match=r"linear_fc1.weight has shape \[8, 4\], the configured model needs \[16, 4\]"
    ):
        check_model(reader, [local_parameter(FC1, nn.Parameter(torch.empty(16, 4)))])


def _remove(name: str) -> Callable[[Path], object]:
    return lambda step: (step / name).unlink()


def _truncate(name: str) -> Callable[[Path], object]:
    return lambda step: (step / name).write_bytes((step / name).read_bytes()[:-1])


def _reseal(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda step: reseal(step, change)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        _remove("rank_00001.safetensors"),
        "rank_00001.safetensors is missing or has another size",
    ),
    "missing index": (_remove("rank_00000.json"), "rank_00000.json is missing"),
    "truncated shard": (
        _truncate("rank_00000.safetensors"),
        "rank_00000.safetensors is missing or has another size",
    ),
    "truncated index": (_truncate("rank_00001.json"), "rank_00001.json is missing or has another size"),
    "truncated manifest": (_truncate(MANIFEST), "manifest.json is damaged"),
    "empty manifest": (lambda step: (step / MANIFEST).write_text(""), "manifest.json is damaged"),
    "manifest of something else": (
        lambda step: (step / MANIFEST).write_text("[1, 2]"),
        "manifest.json is damaged",
    ),
    "flipped data": (
        lambda step: flip(step / "rank_00001.safetensors", -1),
        "rank_00001.safetensors is damaged: its checksum differs",
    ),
    "flipped header": (
        lambda step: flip(step / "rank_00000.safetensors", 20),
        "rank_00000.safetensors is damaged: its checksum differs",
    ),
    "flipped length": (
        lambda step: flip(step / "rank_00000.safetensors", 0),
        "rank_00000.safetensors is damaged: its checksum differs",
    ),
    "flipped index": (
        lambda step: flip(step / "rank_00000.json", 40),
        "rank_00000.json is damaged: its checksum differs",
    ),
    "shard left out": (
        _reseal(
            lambda manifest: [manifest["files"].pop(f"rank_00001.{end}") for end in ("json", "safetensors")]
        ),
        "has 1 of 2 tensor-parallel parts",
    ),
    "other format": (
        _reseal(lambda manifest: manifest.update(format=99)),
        "has checkpoint format 99; this version reads 1",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_clear_line(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    step = write(tmp_path)
    read_all(tmp_path)
    damage(step)
    with pytest.raises(UserError, match=message) as caught:
        read_all(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(step) in str(caught.value)


@pytest.mark.parametrize("name", [MANIFEST, "rank_00000.json", "rank_00001.safetensors"])
def test_any_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path) / name
    original = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        position, mask = draw.randrange(len(original)), 1 << draw.randrange(8)
        flip(path, position, mask)
        if name == MANIFEST and _same_json(path, original):
            continue  # white space between values
        with pytest.raises(UserError):
            read_all(tmp_path)
        path.write_bytes(original)
    read_all(tmp_path)


@pytest.mark.parametrize("file", ["rank_00001.safetensors", "rank_00000.json"])
def test_what_is_read_is_compared_with_its_checksum(tmp_path: Path, file: str) -> None:
    """Also by those who never ask for it."""
    flip(write(tmp_path) / file, -1)
    with pytest.raises(UserError, match=f"{file} is damaged: its checksum differs"):
        dict(open_checkpoint(tmp_path).weights())


def _same_json(path: Path, original: bytes) -> bool:
    try:
        return json.loads(path.read_bytes()) == json.loads(original)
    except ValueError:
        return False


def test_newest_is_what_latest_names(tmp_path: Path) -> None:
    first, second = write(tmp_path, 3), write(tmp_path, 6)
    assert steps_in(tmp_path) == [3, 6]
    assert resolve(tmp_path) == second
    # A crash between the rename and the pointer: the run goes on from what was confirmed.
    (tmp_path / LATEST).write_text("step_00000003\n")
    assert resolve(tmp_path) == first
    assert resolve(second) == second
    (tmp_path / LATEST).write_text("step_00000009\n")
    assert resolve(tmp_path) == second
    assert findings(tmp_path) == ["step_00000009, the newest, is gone"]
    (tmp_path / LATEST).unlink()
    assert resolve(tmp_path) == second
    assert findings(tmp_path) == []


POINTERS: dict[str, bytes] = {
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "a megabyte": b"step_00000003" + b" " * 2**20,
    "control characters": b"step_00000003\x1b[2J",
    "out of the folder": b"../secret/step_00000099",
    "absolute": b"SECRET/step_00000099",
    "here, by a detour": b"./step_00000003",
    "nine digits": b"step_000000003",
    "other digits": "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0663".encode(),
    "too many nines": b"step_" + b"9" * 200,
}


@pytest.mark.parametrize("case", [*POINTERS, "a folder", "a pipe", "a link"])
def test_a_damaged_pointer_is_as_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    """The newest complete step is taken and one line says so, whatever `latest` holds or is."""
    folder, secret = tmp_path / "checkpoints", tmp_path / "secret"
    write(folder, 3)
    second = write(folder, 6)
    write(secret, 99)
    pointer = folder / LATEST
    if case in POINTERS:
        pointer.write_bytes(POINTERS[case].replace(b"SECRET", str(secret).encode()))
    else:
        pointer.unlink()
        {
            "a folder": pointer.mkdir,
            "a pipe": lambda: os.mkfifo(pointer),
            "a link": lambda: pointer.symlink_to(secret / LATEST),
        }[case]()
    assert open_checkpoint(folder).folder == second
    said = capsys.readouterr().err
    assert (said.count("\n"), "`latest`" in said, "step_00000006 is taken as the newest" in said) == (
        1,
        True,
        True,
    )
    assert len(said) < 300
    assert all(character.isprintable() for character in said[:-1])
    assert [finding.partition(":")[2] for finding in findings(folder)] == [
        " step_00000006 is taken as the newest"
    ]
    assert doomed_steps(folder, keep_last=1, keep_every=0) == [3]


def test_names_that_are_no_steps(tmp_path: Path) -> None:
    """A step has one name.

    Others would be the newest for ever, or a second folder of the same step.
    """
    write(tmp_path, 3)
    for name in (
        "step_000000006",
        "step_" + "9" * 200,
        "step_0000007",
        "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0669",
        "step_00000009\n",
    ):
        shutil.copytree(tmp_path / "step_00000003", tmp_path / name)
    assert steps_in(tmp_path) == [3]
    shutil.copytree(tmp_path / "step_00000003", tmp_path / "step_123456789")
    assert steps_in(tmp_path) == [3, 123456789]


def test_a_link_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    first = write(tmp_path / "run", 3)
    (tmp_path / "run" / "step_00000009").symlink_to(write(tmp_path / "secret", 9))
    (tmp_path / "run" / LATEST).write_text("step_00000009\n")
    assert resolve(tmp_path / "run") == first
    assert findings(tmp_path / "run") == ["step_00000009, the newest, is a link, which is not followed"]


def test_a_folder_has_the_name_of_its_step(tmp_path: Path) -> None:
    step = write(tmp_path, 3)
    step.rename(tmp_path / "step_00000009")
    with pytest.raises(
        UserError,
        match="step_00000009 holds the checkpoint of step 3, as its manifest.json says: "
        "rename it to step_00000003, or move it away",
    ):
        open_checkpoint(tmp_path / "step_00000009")
    (tmp_path / "step_00000009").rename(tmp_path / "best")
    assert open_checkpoint(tmp_path / "best").step == 3


def test_run_folder_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint: give a run folder"):
        resolve(tmp_path)
    with pytest.raises(UserError, match="is no checkpoint: it has no manifest.json"):
        CheckpointReader(tmp_path)
    step = write(tmp_path / "run" / "checkpoints")
    assert resolve(tmp_path / "run") == step


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path) -> None:
    step = write(tmp_path)
    for name in (".step_00000006.partial", ".step_00000003.replaced", ".step_00000001.pruned"):
        write(tmp_path / "other", seed=1).rename(tmp_path / name)
    (tmp_path / step_folder(9)).mkdir()
    assert steps_in(tmp_path) == [3]
    assert resolve(tmp_path) == step
