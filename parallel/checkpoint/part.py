"""One file of tensors and its index, as they are written."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from model.files import umask
from parallel.checkpoint.format import Row


def write_part(folder: Path, number: int, tensors: dict[str, Tensor], rows: list[Row]) -> tuple[Path, Path]:
    """Writes file `number` of a checkpoint and its index, `rows`; returns both paths."""
    data, index = folder / f"rank_{number:05d}.safetensors", folder / f"rank_{number:05d}.json"
    save_file(tensors, data)
    data.chmod(0o666 & ~umask())  # safetensors lets nobody but the owner read
    index.write_text(json.dumps({"fragments": rows}))
    return data, index
