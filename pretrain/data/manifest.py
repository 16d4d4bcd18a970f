"""dataset.json: what a data set folder says about itself. Light: no torch, no Megatron."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from model.errors import UserError
from pretrain.data.tokenizer import token_dtype

MANIFEST = "dataset.json"
FORMAT = 1


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest of a data set folder. Raises UserError when there is none, or this version cannot read it."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"data set {folder}: no readable {MANIFEST} ({error.strerror}); name a folder written by `fathom data prepare`"
        ) from error
    except ValueError as error:
        raise UserError(
            f"data set {folder}: {MANIFEST} is damaged ({error}); prepare the data set again"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise UserError(
            f"data set {folder}: {MANIFEST} has format {found!r}, this version reads format {FORMAT}; prepare the data set again"
        )
    return manifest


def split_prefix(folder: str | Path, split: str, manifest: dict[str, Any]) -> str:
    """Returns the path of a split's files without their suffix. Raises UserError when the split is not there or its files were cut short."""
    if split not in manifest["splits"]:
        raise UserError(f"data set {folder}: no split {split!r}; it has {', '.join(manifest['splits'])}")
    prefix = Path(folder) / split
    expected = manifest["splits"][split]["tokens"] * token_dtype(manifest["vocab_size"])().itemsize
    binary = prefix.with_suffix(".bin")
    if not prefix.with_suffix(".idx").is_file() or not binary.is_file():
        raise UserError(
            f"data set {folder}: {split}.bin or {split}.idx is missing; prepare or copy the data set again"
        )
    if binary.stat().st_size != expected:
        raise UserError(
            f"data set {folder}: {split}.bin has {binary.stat().st_size} bytes, {MANIFEST} says {expected}; prepare or copy the data set again"
        )
    return str(prefix)


def fingerprint(manifest: dict[str, Any], split: str) -> str:
    """Returns a hexadecimal name for the tokens of a split, the same wherever the folder lies."""
    identity = json.dumps([manifest["tokenizer_sha256"], split, manifest["splits"][split]], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()
