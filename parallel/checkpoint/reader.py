"""Reading a checkpoint: whole tensors and no process group, to export, inspect and reshard it."""

from __future__ import annotations

import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from model.errors import UserError
from model.files import inside
from model.parameters.shards import Shard, full_shape, put, take
from model.weights.tensor_file import TensorFile, open_tensors
from model.words import printable
from parallel.checkpoint.folders import MANIFEST, read_pointer, resolve
from parallel.checkpoint.format import (
    Fragment,
    SavedProgress,
    Sections,
    file_hash,
    read_index,
    read_manifest,
    saved_progress,
    sections,
)
from parallel.optimizers import STATES

INDEX_FILE = re.compile(r"^rank_[0-9]+\.json\Z")
BYTES = 4
"""Of one element."""


class Run(NamedTuple):
    """Neighbouring elements of one flat tensor: file name, group, first element, and how many."""

    file: str
    group: int
    offset: int
    length: int


class CheckpointReader:
    """One checkpoint.

    Tensors are put together when asked for; files are mapped, and nothing is kept in memory.
    Sizes of all files are compared with the manifest at once.
    The checksum of a file is compared before the first tensor of it is given.
    Raises UserError for a missing or damaged file, naming it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.step: int = self.manifest.step
        self.progress: SavedProgress = saved_progress(folder, self.manifest)
        self.sections: Sections = sections(folder, self.manifest)
        self.fragments: dict[str, list[tuple[str, Fragment]]] = defaultdict(list)
        self._open: dict[str, TensorFile] = {}
        self._flats: dict[tuple[str, int, str], Tensor] = {}
        self._names: dict[str, set[str]] = {}
        self._whole: set[str] = set()
        for file, facts in self.manifest.files.items():
            path = inside(folder, file)
            if not path.is_file() or path.stat().st_size != facts.bytes:
                raise UserError(
                    f"{path} is missing or has another size than its manifest says: use an older checkpoint"
                )
        for file in self.manifest.files:
            if INDEX_FILE.match(file):
                self._read_index(file)
        if not self.fragments:
            raise UserError(f"{folder} holds no parameters: use another checkpoint")

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer saved with the checkpoint, or put there by hand, if any."""
        from model.hf.tokenizer.table import FILES, tokenizer_file

        path = inside(self.folder, tokenizer_file(self.folder).name)
        for name in self.manifest.files:
            if name in FILES:
                self._compare(name)
        return path if path.is_file() else None

    def verify(self, files: list[str] | None = None) -> None:
        """Compares checksums of all files, or of some.

        Raises UserError naming the first that differs.
        """
        for file in files if files is not None else list(self.manifest.files):
            path = inside(self.folder, file)
            if file_hash(path) != self.manifest.files[file].xxh3_64:
                raise UserError(
                    f"{path} is damaged: its checksum differs from the manifest. Use an older checkpoint"
                )
            self._whole.add(file)

    def trust(self) -> None:
        """Call where other processes have compared the checksums of what this one did not."""
        self._whole.update(self.manifest.files)

    def names(self) -> list[str]:
        """Canonical parameter names."""
        return list(self.fragments)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole-model shape of a parameter. Raises UserError for an unknown name."""
        _, fragment = self._pieces(name)[0]
        return full_shape(fragment.shape, fragment.shard)

    def has(self, kind: str, name: str | None = None) -> bool:
        """Whether tensors of a kind ("exp_avg") were saved, of one parameter or of the first."""
        pieces = self._pieces(name) if name else next(iter(self.fragments.values()))
        return all(f"group{fragment.group}.{kind}" in self._tensors(file) for file, fragment in pieces)

    @property
    def trained(self) -> bool:
        """Whether anything that an optimizer keeps was saved. Before the first step nothing is."""
        return any(map(self.has, STATES))

    def tensor(self, name: str, kind: str = "master") -> Tensor:
        """A whole tensor in fp32. kind: one of STATE_KINDS.

        Raises UserError for an unknown name or where elements are missing.
        """
        pieces = self._pieces(name)
        shards = {fragment.shard: fragment.shape for _, fragment in pieces}
        count, shape = pieces[0][1].shard.count, self.shape(name)
        if len(shards) != count:
            raise UserError(f"{self.folder}: {name} has {len(shards)} of {count} tensor-parallel parts")
        if sum(fragment.length for _, fragment in pieces) < math.prod(shape):  # before memory is taken for it
            raise UserError(f"{self.folder}: {name} lacks elements; a file of the checkpoint is missing")
        whole = torch.empty(shape, dtype=torch.float32)
        for shard, part in shards.items():
            put(whole, self.part(name, kind, shard, 0, math.prod(part)).view(part), shard)
        return whole

    def part(self, name: str, kind: str, shard: Shard, start: int, length: int) -> Tensor:
        """Elements start .. start + length of the flattened part `shard` of a tensor.

        Returns fp32 [length], not to be written to.
        Where the checkpoint was saved in such parts only these elements are read.
        Elsewhere the whole tensor is.
        Raises UserError as `tensor` does.
        """
        runs = self.runs(name, shard, start, length)
        if runs is None:
            return take(self.tensor(name, kind), shard).reshape(-1)[start : start + length]
        found = [self.elements(run, kind) for run in runs]
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def runs(self, name: str, shard: Shard, start: int, length: int) -> list[Run] | None:
        """Where these elements of a part lie, in order.

        None where the checkpoint was saved in other parts.
        Raises UserError as `tensor` does.
        """
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

    def elements(self, run: Run, kind: str) -> Tensor:
        """A run of elements, mapped, in fp32. Not to be written to.

        Raises UserError where the file lacks them.
        """
        flat = self._flat(run.file, run.group, kind)
        if run.offset + run.length > flat.numel():
            raise UserError(
                f"{self.folder / run.file}: group{run.group}.{kind} has {flat.numel()} elements, "
                "fewer than its index says: use an older checkpoint"
            )
        return flat[run.offset : run.offset + run.length]

    def rng_states(self, rank: int) -> dict[str, Tensor]:
        """Random states that rank saved."""
        name = f"rank_{rank:05d}.safetensors"
        self._compare(name)
        return {
            key.removeprefix("rng."): self._file(name).get_tensor(key)
            for key in self._tensors(name)
            if key.startswith("rng.")
        }

    def weights(self) -> Mapping[str, Tensor]:
        """Lazy mapping from canonical names to whole fp32 weights."""
        return LazyWeights(self)

    def _read_index(self, file: str) -> None:
        path, data = self.folder / file, file.replace(".json", ".safetensors")
        if data not in self.manifest.files:
            raise UserError(f"{self.folder / MANIFEST} names {file} but not {data}: use an older checkpoint")
        self.verify([file])  # a damaged index could name wrong places without being unreadable
        elements = 0
        for fragment in read_index(path):
            pieces = self.fragments[fragment.name]
            if pieces and _cut(pieces[0][1]) != _cut(fragment):
                raise UserError(
                    f"{path} cuts {printable(fragment.name)} in another way than other files: "
                    "use an older checkpoint"
                )
            pieces.append((data, fragment))
            elements += fragment.length
        if BYTES * elements > self.manifest.files[data].bytes:
            raise UserError(
                f"{path} names {elements} elements, more than {data} can hold: use an older checkpoint"
            )

    def _pieces(self, name: str) -> list[tuple[str, Fragment]]:
        if name not in self.fragments:
            raise UserError(f"{self.folder} holds no parameter {name}: it is a checkpoint of another model")
        return self.fragments[name]

    def _flat(self, file: str, group: int, kind: str) -> Tensor:
        key = (file, group, kind)
        if key not in self._flats:
            self._compare(file)
            try:
                flat = self._file(file).get_tensor(f"group{group}.{kind}")
            except SafetensorError as error:
                raise UserError(
                    f"{self.folder / file} has no tensor group{group}.{kind} ({error}): "
                    "use an older checkpoint"
                ) from None
            if flat.dtype != torch.float32 or flat.dim() != 1:
                raise UserError(
                    f"{self.folder / file}: group{group}.{kind} is no flat fp32 tensor: "
                    "use an older checkpoint"
                )
            self._flats[key] = flat
        return self._flats[key]

    def _compare(self, file: str) -> None:
        """Compares a file with its checksum, once."""
        if file not in self._whole and file in self.manifest.files:
            self.verify([file])

    def _tensors(self, file: str) -> set[str]:
        """Names of the tensors in a file."""
        if file not in self._names:
            self._names[file] = set(self._file(file).keys())
        return self._names[file]

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            try:
                self._open[name] = open_tensors(self.folder / name)
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
    """Opens a checkpoint given its step folder, or the newest of a run or `checkpoints` folder.

    Says in one line where `latest` could not be followed.
    Raises UserError where there is no checkpoint.
    """
    folder = resolve(path)
    problem = read_pointer(folder.parent).problem if folder != Path(path) else ""
    if problem:
        print(
            f"fathom: {folder.parent}: {problem}: {folder.name} is taken as the newest",
            file=sys.stderr,
            flush=True,
        )
    return CheckpointReader(folder)


def _cut(fragment: Fragment) -> tuple[object, ...]:
    """What the pieces of one parameter have in common."""
    shard = fragment.shard
    return fragment.shape, shard.dim, shard.count, shard.stride
