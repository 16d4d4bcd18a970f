"""Canonical weights as the safetensors files of a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.folding.pre_ln import Fold
from model.hf.mapping import Entry
from model.hf.reference import Weights
from model.words import printable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_weights(
    folder: Path,
    todo: list[Entry],
    weights: Weights,
    config: ModelConfig,
    plan: Fold,
    shard_bytes: int,
    itemsize: int,
) -> int:
    """Writes all tensors in fp32 as safetensors shards, with an index where there are several.

    itemsize: bytes per number of the final files.
    Returns the number of parameters.
    Raises UserError for a tensor of another shape than the configuration gives.
    """
    from safetensors.torch import save_file

    groups, sizes, total = [[]], [0], 0  # type: tuple[list[list[Entry]], list[int], int]
    for entry in todo:
        count = sum(torch.Size(shape).numel() for shape in entry.shapes(config).values())
        total += count
        if groups[-1] and sizes[-1] + count * itemsize > shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append(entry)
        sizes[-1] += count * itemsize
    names = ["model.safetensors"]
    if (shards := len(groups)) > 1:
        names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    places: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        shard = {
            hf: tensor for entry in group for hf, tensor in hf_tensors(entry, weights, config, plan).items()
        }
        places.update(dict.fromkeys(shard, name))
        save_file(shard, folder / name, metadata={"format": "pt"})
        del shard  # before the next one is read
    if shards > 1:
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total * itemsize}, "weight_map": places},
        )
    return total


def hf_tensors(entry: Entry, weights: Weights, config: ModelConfig, plan: Fold) -> dict[str, Tensor]:
    """The Hugging Face tensors of one canonical tensor, folded, fp32.

    Raises UserError where its shape is not the configuration's.
    """
    if entry.constant is None:
        tensor = weights[entry.canonical].float()
    elif isinstance(entry.constant, Tensor):
        tensor = entry.constant
    else:
        tensor = torch.full(entry.shape, entry.constant)
    if tuple(tensor.shape) != entry.shape:
        raise UserError(
            f"{entry.canonical} has shape {tuple(tensor.shape)}, "
            f"but the model configuration gives {entry.shape}"
        )
    if (factor := plan.factors.get(entry.canonical, 1.0)) != 1.0:
        tensor = (tensor.double() * factor).float()
    return {
        name: part.contiguous()
        for name, part in zip(entry.hf, entry.conversion.to_hf(tensor, config), strict=True)
    }


def round_weights(folder: Path, dtype: torch.dtype) -> None:
    """Casts the shards of a folder, one at a time.

    Raises UserError where a value is beyond the range of `dtype`.
    """
    from safetensors.torch import load_file, save_file

    for path in sorted(folder.glob("*.safetensors")):
        shard = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        for name, tensor in shard.items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} does not fit into {dtype}: choose --dtype float32 or bfloat16")
        save_file(shard, path, metadata={"format": "pt"})


def parse_size(size: int | str) -> int:
    """Bytes from a number, or from text with a unit such as 500MB or 5GB (decimal).

    Raises UserError for anything else: text without a unit is more likely gigabytes than bytes.
    """
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([KMGT])B?\s*", str(size), re.IGNORECASE)
    count = int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper())) if found else 0
    if not count:
        shown = printable(size, 60)
        raise UserError(
            f"--max-shard-size {shown} is not a size with its unit; write for example 500MB or 5GB"
        )
    return count


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n")
