"""A Hugging Face model as a checkpoint that a run can start from (`checkpoint.load`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from model.errors import UserError
from model.folders import FolderKind, check_target, whole_folder
from model.hf.tokenizer.table import tokenizer_files, vocabulary
from parallel.checkpoint.folders import MANIFEST, step_folder
from parallel.checkpoint.format import FORMAT, Fragment, Row, file_facts, manifest_text
from pretrain.rundir.environment import versions

if TYPE_CHECKING:
    from torch import Tensor

    from model.hf.importer import Imported

# Tensors are gathered into files of about this many bytes, which bounds the memory of an import.
FILE_BYTES = 1 << 30
MODEL = "model.yaml"
IMPORT = FolderKind("an imported model", marker=MODEL, advice="name another folder")


def import_checkpoint(source: str, out: Path | str, *, vocab_multiple: int = 128) -> Path:
    """Reads a local folder or a model of the Hub by name.

    Writes OUT/step_00000000 and OUT/model.yaml.

    model.yaml: the model section of a run that starts from it, for `+include=`.
    Returns the step folder.
    Raises UserError where the source is damaged, the model cannot be represented exactly, or OUT
    holds something; then nothing is left behind.
    """
    from model.hf.importer import import_model
    from model.weights.init import logit_scale

    check_target(out, IMPORT)
    imported = import_model(source, vocab_multiple=vocab_multiple)
    if imported.config.max_position_embeddings is None:  # a checkpoint of no run has no data to tell it
        known = {"max_position_embeddings": imported.positions}
        imported = replace(imported, config=imported.config.model_copy(update=known))
    scale = logit_scale(imported.config)
    if not math.isclose(scale, imported.logit_scale, rel_tol=1e-6):
        raise UserError(
            f"{source} has logit_scale={imported.logit_scale}, but a model with its settings is trained "
            f"with {scale:.6g}: model.init differs"
        )
    if imported.tokenizer:
        _check_tokenizer(imported.tokenizer, imported.config.padded_vocab)
    model = yaml.safe_dump({"model": imported.config.model_dump(mode="json")}, sort_keys=False)
    with whole_folder(out, IMPORT) as folder:
        step = folder / step_folder(0)
        step.mkdir()
        _write(imported, step, source)
        (folder / MODEL).write_text(model, encoding="utf-8")
    return Path(out) / step_folder(0)


def _check_tokenizer(path: Path, rows: int) -> None:
    """Raises UserError for a damaged tokenizer, or ids that the model has no row for."""
    advice = "download it again, or remove it to import the model without a tokenizer"
    try:
        pieces = vocabulary(path)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    if pieces > rows:
        raise UserError(f"{path} has {pieces} pieces, but the model has rows for {rows}: {advice}")


def _parts(imported: Imported) -> Iterator[tuple[dict[str, Tensor], list[Row]]]:
    """(flat tensors, fragment rows) of one file after another."""
    from model.parameters.shards import WHOLE

    tensors: dict[str, Tensor] = {}
    rows: list[Row] = []
    for group, (name, tensor) in enumerate(imported.weights.items()):
        # One group per tensor: groups only say which flat tensor of a file a piece lies in.
        tensors[f"group{group}.master"] = tensor.reshape(-1)
        rows.append(Fragment(name, group, 0, 0, tensor.numel(), tuple(tensor.shape), WHOLE).row())
        if sum(part.nbytes for part in tensors.values()) >= FILE_BYTES:
            yield tensors, rows
            tensors, rows = {}, []
    if tensors:
        yield tensors, rows


def _write(imported: Imported, folder: Path, source: str) -> None:
    from safetensors.torch import save_file

    files: list[str] = []
    for number, (tensors, rows) in enumerate(_parts(imported)):
        name = f"rank_{number:05d}"
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps({"fragments": rows}))
        files += [f"{name}.safetensors", f"{name}.json"]
    if imported.tokenizer:
        for name, content in tokenizer_files(imported.tokenizer).items():
            (folder / name).write_bytes(content)
    facts = {name: file_facts(folder / name).model_dump() for name in files}
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
            "imported_layout": imported.layout,
            "special_tokens": imported.special,
            "left_out": list(imported.left_out),
            **imported.inputs,
        },
        "config": {"model": imported.config.model_dump(mode="json")},
        "versions": versions(),
    }
    (folder / MANIFEST).write_text(manifest_text(manifest))
