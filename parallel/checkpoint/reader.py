"""Reading a checkpoint, by whole tensors and without a process group: for export, inspection and resharding."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import UserError
from model.shards import full_shape, put
from parallel.checkpoint.format import Fragment, file_hash, fragment_from_json, read_manifest, resolve


class CheckpointReader:
    """One checkpoint. Tensors are put together when asked for; nothing is kept.

    Raises UserError for a missing or damaged file, naming it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.step: int = self.manifest["step"]
        self.config: dict[str, Any] = self.manifest["config"]
        self.progress: dict[str, Any] = self.manifest["progress"]
        self.fragments: dict[str, list[tuple[str, Fragment]]] = defaultdict(list)
        self._open: dict[str, Any] = {}
        for file, facts in self.manifest["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise UserError(f"{path} is missing or has another size than its manifest says: use an older checkpoint")
            if file.endswith(".json"):
                for row in json.loads(path.read_text())["fragments"]:
                    fragment = fragment_from_json(row)
                    self.fragments[fragment.name].append((file.replace(".json", ".safetensors"), fragment))

    @property
    def tokenizer_path(self) -> Path | None:
        """The SentencePiece model saved with the checkpoint, if any."""
        path = self.folder / "tokenizer.model"
        return path if path.is_file() else None

    def verify(self, files: list[str] | None = None) -> None:
        """Compares checksums of all files, or of some. Raises UserError naming the first that differs."""
        for file in files if files is not None else list(self.manifest["files"]):
            if file_hash(self.folder / file) != self.manifest["files"][file]["sha256"]:
                raise UserError(f"{self.folder / file} is damaged: its checksum differs from the manifest. Use an older checkpoint")

    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self.fragments)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole-model shape of a parameter. Raises UserError for an unknown name."""
        _, fragment = self._pieces(name)[0]
        return full_shape(fragment.shape, fragment.shard)

    def has(self, kind: str) -> bool:
        """Whether tensors of a kind ("exp_avg") were saved; before the first step there are no moments."""
        file, fragment = next(iter(self.fragments.values()))[0]
        return f"group{fragment.group}.{kind}" in self._file(file).keys()  # noqa: SIM118 - a safetensors file is no mapping

    def tensor(self, name: str, kind: str = "master") -> Tensor:
        """A whole tensor in fp32. kind: master, exp_avg or exp_avg_sq. Raises UserError for an unknown name or where elements are missing."""
        pieces = self._pieces(name)
        whole = torch.empty(self.shape(name), dtype=torch.float32)
        parts: dict[Any, tuple[Tensor, int]] = {}
        for file, fragment in pieces:
            local, filled = parts.get(fragment.shard, (None, 0))
            if local is None:
                local = torch.empty(fragment.shape, dtype=torch.float32)
            values = self._file(file).get_slice(f"group{fragment.group}.{kind}")[fragment.offset : fragment.offset + fragment.length]
            local.view(-1)[fragment.start : fragment.start + fragment.length] = values
            parts[fragment.shard] = (local, filled + fragment.length)
        for shard, (local, filled) in parts.items():
            if filled != local.numel():
                raise UserError(f"{self.folder}: {name} has {filled} of {local.numel()} elements; a file of the checkpoint is missing")
            put(whole, local, shard)
        if len(parts) != pieces[0][1].shard.count:
            raise UserError(f"{self.folder}: {name} has {len(parts)} of {pieces[0][1].shard.count} tensor-parallel parts")
        return whole

    def rng_states(self, rank: int) -> dict[str, Tensor]:
        """Random states that rank saved."""
        file = self._file(f"rank_{rank:05d}.safetensors")
        return {name.removeprefix("rng."): file.get_tensor(name) for name in file.keys() if name.startswith("rng.")}  # noqa: SIM118

    def weights(self) -> Mapping[str, Tensor]:
        """Lazy mapping from canonical names to whole fp32 weights."""
        return LazyWeights(self)

    def _pieces(self, name: str) -> list[tuple[str, Fragment]]:
        if name not in self.fragments:
            raise UserError(f"{self.folder} holds no parameter {name}: it is a checkpoint of another model")
        return self.fragments[name]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / name} cannot be read ({error}): use an older checkpoint") from None
        return self._open[name]


class LazyWeights(Mapping[str, Tensor]):
    """Canonical names -> whole fp32 weights, read at each access."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.reader = reader

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.reader.fragments:
            raise KeyError(name)
        return self.reader.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader.fragments)

    def __len__(self) -> int:
        return len(self.reader.fragments)


def open_checkpoint(path: Path | str) -> CheckpointReader:
    """Opens a checkpoint given a run folder, a `checkpoints` folder (both: the newest) or a step folder. Raises UserError where there is none."""
    return CheckpointReader(resolve(path))
