"""A Hugging Face folder that someone else wrote, or the Hub gives: its files and their tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from model.errors import UserError
from model.files import inside
from model.records import Record, read_record
from model.weights.tensor_file import TensorFile, open_tensors
from model.words import printable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "download the model again"


def source_file(folder: Path, name: str) -> Path | None:
    """A file of the folder; None where there is none of this name.

    Raises UserError for a name or a link that leads out of the folder,
    and for what is no regular file.
    """
    path = folder / name if _blob(folder, name) else inside(folder, name)
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise UserError(f"{folder / printable(name)} is no regular file: {AGAIN}")
    return path


def _blob(folder: Path, name: str) -> bool:
    """Whether a file is a link of the Hub's cache: from a snapshot to the blobs beside them all."""
    if folder.parent.name != "snapshots" or Path(name).name != name:
        return False
    blobs = os.path.realpath(folder.parent.parent / "blobs")
    return os.path.dirname(os.path.realpath(folder / name)) == blobs


class Index(Record):
    """What model.safetensors.index.json says."""

    weight_map: dict[str, str]
    """Tensor name -> file name."""


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a model folder, read from disk as they are asked for.

    Raises UserError where the folder has no safetensors, or files that are damaged,
    naming the first.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, TensorFile] = {}
        self._places: dict[str, str] = {}
        index, single = source_file(folder, INDEX), source_file(folder, SINGLE)
        if index is not None:
            self._places = read_record(index, Index, AGAIN).weight_map
            for name in dict.fromkeys(self._places.values()):
                self._open(folder, name)
            self._check_places(index)
        elif single is not None:
            self._open(folder, SINGLE)
            self._places = dict.fromkeys(self._files[SINGLE].keys(), SINGLE)
        else:
            raise UserError(
                f"{folder} has no {SINGLE}: load it with transformers and save it again with save_pretrained"
            )

    def _open(self, folder: Path, name: str) -> None:
        path = source_file(folder, name)
        if path is None:
            raise UserError(f"{folder / printable(name)} is missing, although {INDEX} names it: {AGAIN}")
        try:
            self._files[name] = open_tensors(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({printable(error)}): {AGAIN}") from None

    def _check_places(self, index: Path) -> None:
        held = {name: set(file.keys()) for name, file in self._files.items()}
        for tensor, name in self._places.items():
            if tensor not in held[name]:
                shown = printable(tensor)
                raise UserError(
                    f"{index.parent / name} has no tensor {shown!r}, although {INDEX} names it: {AGAIN}"
                )

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, element type as safetensors calls it) of a tensor, from its file's header."""
        part = self._files[self._places[name]].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[self._places[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
