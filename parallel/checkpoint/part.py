"""One file of tensors and its index, as they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from model.files import umask


def write_part(
    folder: Path, number: int, tensors: dict[str, Tensor], rows: list[list[Any]]
) -> tuple[Path, Path]:
    """Writes file `number` of a checkpoint and its index; returns both paths.

    rows: fragments as JSON.
    """
    data, index = folder / f"rank_{number:05d}.safetensors", folder / f"rank_{number:05d}.json"
    save_file(tensors, data)
    data.chmod(0o666 & ~umask())  # safetensors lets nobody but the owner read
    index.write_text(json.dumps({"fragments": rows}))
    return data, index
