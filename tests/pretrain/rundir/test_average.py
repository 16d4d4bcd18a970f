"""The mean of checkpoints is a checkpoint of its own, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.errors import UserError
from model.parameters.shards import WHOLE, Shard
from parallel.checkpoint.folders import MANIFEST, step_folder
from parallel.checkpoint.format import FORMAT, Fragment, file_facts, manifest_text
from parallel.checkpoint.part import write_part
from parallel.checkpoint.reader import open_checkpoint
from pretrain.rundir.average import average_checkpoints

SHAPE = (4, 3)


def save(run: Path, step: int, weights: torch.Tensor, shards: int = 1) -> None:
    """A checkpoint of one matrix, whole or cut over tensor-parallel ranks, with moments."""
    folder = run / "checkpoints" / step_folder(step)
    folder.mkdir(parents=True)
    files: list[Path] = []
    for rank, part in enumerate(weights.chunk(shards)):
        shard = WHOLE if shards == 1 else Shard(0, rank, shards)
        row = Fragment("w", 0, 0, 0, part.numel(), tuple(part.shape), shard).row()
        flat = part.reshape(-1).clone()
        files += write_part(folder, rank, {"group0.master": flat, "group0.exp_avg": flat.clone()}, [row])
    (folder / "tokenizer.model").write_bytes(b"t")
    files.append(folder / "tokenizer.model")
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": shards,
        "files": {path.name: file_facts(path).model_dump() for path in files},
        "progress": {"optimizer_step": step, "consumed_tokens": 9 * step},
        "config": {"name": "a"},
    }
    (folder / MANIFEST).write_text(manifest_text(manifest))


def test_the_newest_are_averaged_in_fp32_whatever_their_layout(tmp_path: Path) -> None:
    weights = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)) for step in range(4)]
    for step, one in enumerate(weights):
        save(tmp_path, step + 1, one, shards=1 + step % 2)
    folder, steps = average_checkpoints(tmp_path, 3)
    assert steps == [2, 3, 4]
    assert folder == tmp_path / "checkpoints" / "average_00000004_of_3"
    reader = open_checkpoint(folder)
    reader.verify()
    assert torch.equal(reader.tensor("w"), (weights[1] + weights[2] + weights[3]) / 3)
    assert not reader.has("exp_avg")
    assert reader.tokenizer_path == folder / "tokenizer.model"
    assert (reader.step, reader.progress.optimizer_step, reader.progress.consumed_tokens) == (4, 0, 36)
    assert reader.manifest.progress["averaged_steps"] == [2, 3, 4]
    assert open_checkpoint(tmp_path).step == 4  # the run's newest is its own
    assert open_checkpoint(tmp_path).has("exp_avg")
    with pytest.raises(UserError, match="is there already"):
        average_checkpoints(tmp_path, 3)


def test_what_cannot_be_averaged_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, torch.zeros(SHAPE))
    save(tmp_path, 2, torch.zeros(5, 3))
    with pytest.raises(UserError, match="has 2 complete checkpoints"):
        average_checkpoints(tmp_path, 3)
    with pytest.raises(UserError, match="step_00000001 is of another model than .*step_00000002"):
        average_checkpoints(tmp_path, 2, tmp_path / "mean")
    save(tmp_path, 3, torch.zeros(5, 3))
    data = tmp_path / "checkpoints" / step_folder(3) / "rank_00000.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="rank_00000.safetensors is damaged"):
        average_checkpoints(tmp_path, 2, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
