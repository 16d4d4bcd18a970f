"""What is in a checkpoint folder: pieces of parameters, and a manifest with checksums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from model.errors import UserError
from model.parameters.shards import Shard
from parallel.checkpoint.folders import MANIFEST

FORMAT = 1
KINDS = ("master", "exp_avg", "exp_avg_sq")
CHECKSUM = "xxh3_64"  # finds damage at the speed of memory; it is no protection against forgery
HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Fragment:
    """A run of elements that one process owns.

    name: canonical parameter name; shard and shape: which tensor-parallel part of the whole (`shape` is the part's);
    start, length: elements of the flattened part; offset: where they lie in the flat tensor of `group`.
    """

    name: str
    group: int
    offset: int
    start: int
    length: int
    shape: tuple[int, ...]
    shard: Shard

    def to_json(self) -> list[Any]:
        """As a compact JSON list; the inverse of `fragment_from_json`."""
        shard = self.shard
        return [
            self.name,
            self.group,
            self.offset,
            self.start,
            self.length,
            list(self.shape),
            [shard.dim, shard.index, shard.count, shard.stride],
        ]


def fragment_from_json(row: list[Any]) -> Fragment:
    """A fragment from its JSON list."""
    name, group, offset, start, length, shape, shard = row
    return Fragment(name, group, offset, start, length, tuple(shape), Shard(*shard))


def file_hash(path: Path) -> str:
    """Checksum of a file, by the method `CHECKSUM`."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, CHECKSUM: file_hash(path)}


def manifest_text(manifest: dict[str, Any]) -> str:
    """A manifest as it is written, sealed with a checksum of its own content."""
    return json.dumps(manifest | {CHECKSUM: _seal(manifest)}, indent=1)


def _seal(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    # Read back first, so that what is sealed is what a reader will see (tuples are lists there).
    return xxhash.xxh3_64_hexdigest(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step folder. Raises UserError where it is missing, damaged, or of a format this version does not read."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}): use an older checkpoint") from None
    if not isinstance(manifest, dict) or manifest.get(CHECKSUM) != _seal(manifest):
        raise UserError(
            f"{folder / MANIFEST} is damaged: its content differs from its checksum. Use an older checkpoint"
        )
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {manifest.get('format')!r}; this version reads {FORMAT}"
        )
    return manifest
