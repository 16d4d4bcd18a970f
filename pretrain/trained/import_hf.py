"""A Hugging Face model as a checkpoint that a run can start from (`checkpoint.load`)."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from model.errors import UserError
from model.files import atomic_write_text, sync_folder, umask
from parallel.checkpoint.folders import MANIFEST, step_folder
from parallel.checkpoint.format import FORMAT, Fragment, file_facts, manifest_text
from pretrain.rundir.environment import versions

if TYPE_CHECKING:
    from torch import Tensor

    from model.hf.importer import Imported

# Tensors are gathered into files of about this many bytes, which bounds the memory of an import.
FILE_BYTES = 1 << 30


def import_checkpoint(source: str, out: Path | str, *, vocab_multiple: int = 128) -> Path:
    """Reads a local folder or a model of the Hub by name, and writes OUT/step_00000000 and OUT/model.yaml; returns the former.

    model.yaml: the model section of a run that starts from it, for `+include=`.

    Raises UserError where the model cannot be represented exactly, with the reason, or the folder exists.
    """
    from model.hf.importer import import_model
    from model.weights.init import logit_scale

    target = Path(out) / step_folder(0)
    if target.exists():
        raise UserError(f"{target} exists: choose another folder")
    imported = import_model(source, vocab_multiple=vocab_multiple)
    scale = logit_scale(imported.config)
    if not math.isclose(scale, imported.logit_scale, rel_tol=1e-6):
        raise UserError(
            f"{source} has logit_scale={imported.logit_scale}, but a model with its settings is trained with {scale:.6g}: model.init differs"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(imported, partial, source)
        partial.chmod(0o777 & ~umask())
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(target.parent)
    atomic_write_text(
        target.parent / "model.yaml",
        yaml.safe_dump({"model": imported.config.model_dump(mode="json")}, sort_keys=False),
    )
    return target


def _parts(imported: Imported) -> Iterator[tuple[dict[str, Tensor], list[list[Any]]]]:
    """(flat tensors, fragment rows) of one file after another."""
    from model.parameters.shards import WHOLE

    tensors: dict[str, Tensor] = {}
    rows: list[list[Any]] = []
    for group, (name, tensor) in enumerate(imported.weights.items()):
        # One group per tensor: groups only say which flat tensor of a file a piece lies in.
        tensors[f"group{group}.master"] = tensor.reshape(-1)
        rows.append(Fragment(name, group, 0, 0, tensor.numel(), tuple(tensor.shape), WHOLE).to_json())
        if sum(part.nbytes for part in tensors.values()) >= FILE_BYTES:
            yield tensors, rows
            tensors, rows = {}, []
    if tensors:
        yield tensors, rows


def _write(imported: Imported, folder: Path, source: str) -> None:
    from parallel.checkpoint.part import write_part

    files: list[str] = []
    for number, (tensors, rows) in enumerate(_parts(imported)):
        files += [path.name for path in write_part(folder, number, tensors, rows)]
    if imported.tokenizer:
        shutil.copyfile(imported.tokenizer, folder / "tokenizer.model")
    facts = {name: file_facts(folder / name) for name in files}
    manifest = {
        "format": FORMAT,
        "step": 0,
        "world_size": 0,
        "layout": None,
        "files": facts,
        "progress": {
            "optimizer_step": 0,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "imported_from": source,
            "special_tokens": imported.special,
        },
        "config": {"model": imported.config.model_dump(mode="json")},
        "versions": versions(),
    }
    (folder / MANIFEST).write_text(manifest_text(manifest))
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
