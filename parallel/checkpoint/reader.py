"""Reading a checkpoint, by whole tensors and without a process group: for export, inspection and resharding."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import UserError
from model.parameters.shards import Shard, full_shape, put, take
from parallel.checkpoint.folders import resolve
from parallel.checkpoint.format import CHECKSUM, Fragment, file_hash, fragment_from_json, read_manifest

INDEX_FILE = re.compile(r"^rank_\d+\.json$")


class Run(NamedTuple):
    """Neighbouring elements of one flat tensor: file name, group, first element, and how many."""

    file: str
    group: int
    offset: int
    length: int


class CheckpointReader:
    """One checkpoint. Tensors are put together when asked for; files are mapped, and nothing is kept in memory.

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
        self._flats: dict[tuple[str, int, str], Tensor] = {}
        for file, facts in self.manifest["files"].items():
            path = folder / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise UserError(
                    f"{path} is missing or has another size than its manifest says: use an older checkpoint"
                )
            if INDEX_FILE.match(file):
                # A damaged index could name wrong places without being unreadable.
                self.verify([file])
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
            if file_hash(self.folder / file) != self.manifest["files"][file][CHECKSUM]:
                raise UserError(
                    f"{self.folder / file} is damaged: its checksum differs from the manifest. Use an older checkpoint"
                )

    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self.fragments)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole-model shape of a parameter. Raises UserError for an unknown name."""
        _, fragment = self._pieces(name)[0]
        return full_shape(fragment.shape, fragment.shard)

    def has(self, kind: str, name: str | None = None) -> bool:
        """Whether tensors of a kind ("exp_avg") were saved, of one parameter or of the first. Before the first step there are no moments."""
        file, fragment = self._pieces(name)[0] if name else next(iter(self.fragments.values()))[0]
        return f"group{fragment.group}.{kind}" in self._file(file).keys()

    def tensor(self, name: str, kind: str = "master") -> Tensor:
        """A whole tensor in fp32. kind: master, exp_avg or exp_avg_sq. Raises UserError for an unknown name or where elements are missing."""
        pieces = self._pieces(name)
        shards = {fragment.shard: fragment.shape for _, fragment in pieces}
        count = pieces[0][1].shard.count
        if len(shards) != count:
            raise UserError(f"{self.folder}: {name} has {len(shards)} of {count} tensor-parallel parts")
        whole = torch.empty(self.shape(name), dtype=torch.float32)
        for shard, shape in shards.items():
            put(whole, self.part(name, kind, shard, 0, math.prod(shape)).view(shape), shard)
        return whole

    def part(self, name: str, kind: str, shard: Shard, start: int, length: int) -> Tensor:
        """Elements start .. start + length of the flattened part `shard` of a tensor, in fp32 [length]; not to be written to.

        Where the checkpoint was saved in such parts only these elements are read, else the whole tensor. Raises UserError as `tensor` does.
        """
        runs = self.runs(name, shard, start, length)
        if runs is None:
            return take(self.tensor(name, kind), shard).reshape(-1)[start : start + length]
        found = [self.flat(run.file, run.group, kind)[run.offset : run.offset + run.length] for run in runs]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def runs(self, name: str, shard: Shard, start: int, length: int) -> list[Run] | None:
        """Where these elements of a part lie, in order; None where the checkpoint was saved in other parts. Raises UserError as `tensor` does."""
        pieces = [
            (fragment.start, file, fragment)
            for file, fragment in self._pieces(name)
            if fragment.shard == shard
        ]
        if not pieces:
            return None
        found, at = [], start
        for first, file, fragment in sorted(pieces, key=itemgetter(0)) if len(pieces) > 1 else pieces:
            high = min(start + length, first + fragment.length)
            if first <= at < high:
                found.append(Run(file, fragment.group, fragment.offset + at - first, high - at))
                at = high
        if at != start + length:
            raise UserError(
                f"{self.folder}: {name} lacks elements from {at} on; a file of the checkpoint is missing"
            )
        return found

    def flat(self, file: str, group: int, kind: str) -> Tensor:
        """A flat tensor of a file, mapped: its bytes are read when they are used. Not to be written to. Raises UserError where the file lacks it."""
        key = (file, group, kind)
        if key not in self._flats:
            try:
                self._flats[key] = self._file(file).get_tensor(f"group{group}.{kind}")
            except SafetensorError as error:
                raise UserError(
                    f"{self.folder / file} has no tensor group{group}.{kind} ({error}): use an older checkpoint"
                ) from None
        return self._flats[key]

    def rng_states(self, rank: int) -> dict[str, Tensor]:
        """Random states that rank saved."""
        file = self._file(f"rank_{rank:05d}.safetensors")
        return {
            name.removeprefix("rng."): file.get_tensor(name)
            for name in file.keys()
            if name.startswith("rng.")
        }

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
                raise UserError(
                    f"{self.folder / name} cannot be read ({error}): use an older checkpoint"
                ) from None
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
