"""A checkpoint put together by hand from whole tensors.

To test reading without the writer, an engine or a process group.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.parameters.shards import Shard, take
from model.parameters.table import parameter_table
from parallel.checkpoint.folders import LATEST, MANIFEST, step_folder
from parallel.checkpoint.format import FORMAT, STATE_KINDS, Fragment, file_facts, manifest_text

MODEL = ModelConfig(
    scheme="pre_ln",
    num_layers=1,
    hidden_size=4,
    num_attention_heads=1,
    ffn_hidden_size=4,
    activation="swiglu",
    normalization="rmsnorm",
    bias=False,
    position="none",
    vocab_size=2,
    vocab_multiple=2,
    max_position_embeddings=8,
)
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.0.mlp.linear_fc2.weight"
NAMES = {row.name: row.shape for row in parameter_table(MODEL)}


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Whole tensors by kind and name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}
        for kind in STATE_KINDS
    }


def write(folder: Path, step: int = 3, seed: int = 0) -> Path:
    """Writes `step` into a `checkpoints` folder; returns the step folder.

    It is what two tensor-parallel ranks with a split optimizer state would write.
    fc1 is gated and cut in two.
    fc2 is whole and its elements lie in both files, the later ones first.
    The others are whole in the first file.
    """
    whole, target = tensors(seed), folder / step_folder(step)
    target.mkdir(parents=True)
    plain = Shard(None, 0, 1)
    files: dict[str, Any] = {}
    for rank in (0, 1):
        shard = Shard(0, rank, 2, 2)
        low, high = ((5, 16), (0, 5))[rank]
        rows = [
            Fragment(FC1, 0, 0, 0, 16, (4, 4), shard),
            Fragment(FC2, 1, 0, low, high - low, (4, 4), plain),
        ]
        others = [name for name in NAMES if name not in (FC1, FC2)] if rank == 0 else []
        at = high - low
        for name in others:
            rows.append(Fragment(name, 1, at, 0, math.prod(NAMES[name]), NAMES[name], plain))
            at += math.prod(NAMES[name])
        data = {"rng.cpu": torch.get_rng_state()}
        for kind in STATE_KINDS:
            pieces = [whole[kind][FC2].flatten()[low:high], *(whole[kind][name].flatten() for name in others)]
            data |= {
                f"group0.{kind}": take(whole[kind][FC1], shard).flatten(),
                f"group1.{kind}": torch.cat(pieces),
            }
        name = f"rank_{rank:05d}"
        save_file({key: value.contiguous() for key, value in data.items()}, target / f"{name}.safetensors")
        (target / f"{name}.json").write_text(json.dumps({"fragments": [row.row() for row in rows]}))
        files |= {
            one.name: file_facts(one).model_dump()
            for one in (target / f"{name}.safetensors", target / f"{name}.json")
        }
    manifest = {
        "format": FORMAT,
        "step": step,
        "time": 1.7e9,
        "world_size": 2,
        "layout": {"tp": 2, "pp": 1, "vp": 1, "cp": 1, "dp": 1, "zero": 1},
        "files": files,
        "progress": {"optimizer_step": step, "consumed_tokens": 128 * step},
        "config": {
            "name": "run",
            "model": MODEL.model_dump(mode="json"),
            "data": {"seq_length": 8, "corpora": [{"path": "nowhere", "weight": 1.0}], "cache": None},
            "train": {"micro_batch_size": 2, "precision": "fp32"},
            "optimizer": {"kind": "adamw"},
        },
        "versions": {"torch": torch.__version__},
    }
    (target / MANIFEST).write_text(manifest_text(manifest))
    (folder / LATEST).write_text(step_folder(step) + "\n")
    return target


def reseal(step: Path, change: Callable[[dict[str, Any]], object], *files: str) -> None:
    """Changes a manifest as a forger would, who can compute checksums.

    files: whose size and checksum are taken anew.
    """
    manifest = json.loads((step / MANIFEST).read_text())
    manifest.pop("xxh3_64")
    change(manifest)
    for name in files:
        manifest["files"][name] = file_facts(step / name).model_dump()
    (step / MANIFEST).write_text(manifest_text(manifest))


def flip(path: Path, position: int, mask: int = 0x01) -> None:
    """Changes one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)
