"""What a checkpoint folder looks like, and how folders and the pointer to the newest are found."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from model.errors import UserError
from model.parameters.shards import Shard

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
KINDS = ("master", "exp_avg", "exp_avg_sq")
STEP_FOLDER = re.compile(r"^step_(\d{8,})$")
LEFTOVER = re.compile(r"^\.(step_\d{8,})(?:\.[\w.-]+)?\.(partial|replaced|pruned)$")
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


def step_folder(step: int) -> str:
    """Folder name of a step."""
    return f"step_{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a `checkpoints` folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(match[1])
        for entry in folder.iterdir()
        if (match := STEP_FOLDER.match(entry.name)) and (entry / MANIFEST).is_file()
    )


def leftovers_in(folder: Path, *, older_than_s: float = 0.0) -> list[Path]:
    """What killed saves and removals left in a `checkpoints` folder. older_than_s: only what nobody changed within so many seconds."""
    horizon = time.time() - older_than_s
    return sorted(
        entry for entry in folder.iterdir() if LEFTOVER.match(entry.name) and entry.stat().st_mtime <= horizon
    )


def findings(folder: Path) -> list[str]:
    """What killed processes left in a `checkpoints` folder, a phrase each; empty where the newest save was completed."""
    if not folder.is_dir():
        return []
    marks = [match for entry in leftovers_in(folder) if (match := LEFTOVER.match(entry.name))]
    found = [f"{match[1]} is incomplete (killed while saving)" for match in marks if match[2] == "partial"]
    pointer = folder / LATEST
    newest = pointer.read_text().strip() if pointer.is_file() else ""
    if newest and not (folder / newest / MANIFEST).is_file():
        found.append(f"{newest}, the newest, is gone")
    elif newest:
        later = [step_folder(step) for step in steps_in(folder) if newest < step_folder(step)]
        found += [f"{name} was not confirmed (killed before `{LATEST}` named it)" for name in later]
    return found


def resolve(path: Path | str) -> Path:
    """The step folder meant by a run folder, a `checkpoints` folder or a step folder. Raises UserError where there is none."""
    start = Path(path)
    if (start / MANIFEST).is_file():
        return start
    for folder in (start, start / "checkpoints"):
        steps = steps_in(folder)
        if not steps:
            continue
        pointer = folder / LATEST
        if pointer.is_file():
            named = folder / pointer.read_text().strip()
            if (named / MANIFEST).is_file():
                return named
        return folder / step_folder(steps[-1])
    raise UserError(
        f"{path} holds no checkpoint: give a run folder, its checkpoints folder, or a folder with {MANIFEST}"
    )


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
