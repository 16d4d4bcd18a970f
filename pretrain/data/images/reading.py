"""Which images an INPUT stands for, and their classes. Nothing here imports torch or Megatron."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import UserError
from model.words import printable
from pretrain.data.reading.hub import load_named
from pretrain.data.reading.raw_record import Broken, Record

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), 0),
    **dict.fromkeys(("validation", "val", "valid", "dev"), 1),
    "test": 2,
}
"""What folders and parts of data sets are called, and the split they are."""


class Picture(NamedTuple):
    """One image as found."""

    content: Path | bytes
    label: int
    """Number of its class."""
    split: int | None
    """Where its input has splits."""


@dataclass(frozen=True)
class ImageInput:
    """One INPUT and its images."""

    name: str
    classes: tuple[str, ...]
    """Sorted."""
    splits: frozenset[int]
    """That it names; empty where it has none."""
    kind: str

    def records(self, classes: tuple[str, ...]) -> Iterator[tuple[Record, int]]:
        """Its images with their sizes in bytes. classes: of all inputs."""
        raise NotImplementedError


@dataclass(frozen=True)
class Folder(ImageInput):
    """Sub-folders, one a class, perhaps below folders called train, validation and test."""

    files: tuple[tuple[str, str, int | None], ...] = ()
    """Paths, classes and splits, mixed, so that the first ones are a sample of all."""

    def records(self, classes: tuple[str, ...]) -> Iterator[tuple[Record, int]]:
        """As `ImageInput`."""
        numbers = {name: number for number, name in enumerate(classes)}
        for path, name, split in self.files:
            size = os.path.getsize(path) if os.path.exists(path) else 0
            yield Record(path, path, 0, Picture(Path(path), numbers[name], split)), size


@dataclass(frozen=True)
class Table(ImageInput):
    """A data set of the `datasets` library with a column of images and one of classes."""

    parts: tuple[tuple[Any, int | None], ...] = ()
    """Data sets and their splits."""
    image: str = ""
    label: str = ""

    def records(self, classes: tuple[str, ...]) -> Iterator[tuple[Record, int]]:
        """As `ImageInput`."""
        from datasets import Image

        numbers = {name: number for number, name in enumerate(classes)}
        for data, split in self.parts:
            names = data.features[self.label]
            for row, entry in enumerate(data.cast_column(self.image, Image(decode=False)), start=1):
                found, label = entry[self.image], entry[self.label]
                content = (found or {}).get("bytes") or (found or {}).get("path")
                what = _label_problem(label, names.num_classes)
                if content is None or what:
                    what = "no image" if content is None else what
                    yield Record(self.name, self.name, row, Broken(self.name, row, what)), 0
                    continue
                picture = Picture(
                    content if isinstance(content, bytes) else Path(content),
                    numbers[names.int2str(int(label))],
                    split,
                )
                yield Record(self.name, self.name, row, picture), len(content)


def _label_problem(label: int | None, classes: int) -> str:
    """Why a number is no class; empty where it is one. Files hold whatever number was written."""
    if label is None or label < 0:
        return "no class"
    return f"class {label}, but the classes are 0 to {classes - 1}" if label >= classes else ""


def find_images(inputs: list[str], streaming: bool = False) -> list[ImageInput]:
    """Resolves the INPUTs: folders of images, folders that `datasets` saved, .parquet files, names.

    Raises UserError when an input matches nothing or has no classes.
    """
    if not inputs:
        raise UserError("INPUT: nothing to read; name folders of images, or a data set")
    return [_found(given, streaming) for given in inputs]


def _found(given: str, streaming: bool) -> ImageInput:
    path = Path(given)
    if path.is_dir() and not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return _folder(given, path)
    if path.exists() or given.startswith("hf://") or not given.startswith((".", "/", "~")):
        return _table(given, path)
    raise UserError(f"INPUT {printable(given)}: there is no such folder")


def _folder(given: str, path: Path) -> Folder:
    inside = _visible(path)
    named = {
        folder: SPLIT_NAMES[folder.name.lower()] for folder in inside if folder.name.lower() in SPLIT_NAMES
    }
    if named and len(named) < len(inside):
        others = next(folder.name for folder in inside if folder not in named)
        first = next(folder.name for folder in named)
        raise UserError(
            f"INPUT {printable(given)}: has folders of splits ({first}) and others ({printable(others)}); "
            "name the folder of one split, or move the others away"
        )
    groups: dict[Path, int | None] = {**named} or {path: None}
    files: list[tuple[str, str, int | None]] = []
    for folder, split in groups.items():
        for kind in _visible(folder):
            for base, folders, names in os.walk(kind, followlinks=True):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                files += [(f"{base}/{name}", kind.name, split) for name in names if not name.startswith(".")]
    if not files:
        raise UserError(
            f"INPUT {printable(given)}: no files in sub-folders; images have to lie in "
            "one sub-folder for each class"
        )
    files.sort(
        key=lambda file: hashlib.blake2b(os.path.relpath(file[0], path).encode(errors="replace")).digest()
    )
    classes = tuple(sorted({name for _, name, _ in files}))
    return Folder(given, classes, frozenset(named.values()), "folder", tuple(files))


def _visible(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))


def _table(given: str, path: Path) -> Table:
    import datasets

    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(given)
        elif path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=given)
        else:
            loaded = load_named(given, given.removeprefix("hf://"))
    except UserError:
        raise
    except Exception as error:  # whatever a library and a network have to say
        raise UserError(
            f"INPUT {printable(given)}: cannot be loaded ({printable(str(error), 300)})"
        ) from error
    parts = dict(loaded.items()) if isinstance(loaded, dict) else {"": loaded}
    first = next(iter(parts.values()))
    columns = {
        kind: next((name for name, feature in first.features.items() if isinstance(feature, of)), None)
        for kind, of in (("Image", datasets.Image), ("ClassLabel", datasets.ClassLabel))
    }
    for kind, column in columns.items():
        if column is None:
            shown = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in first.features.items())
            raise UserError(
                f"INPUT {printable(given)}: has no column of type {kind}; its columns "
                f"are {printable(shown, 300)}"
            )
    known = [
        (part, SPLIT_NAMES.get(name.lower()) if len(parts) > 1 else None) for name, part in parts.items()
    ]
    if len(parts) > 1 and any(split is None for _, split in known):
        unknown = next(name for name in parts if name.lower() not in SPLIT_NAMES)
        raise UserError(f"INPUT {printable(given)}: split {unknown!r} is none of train, validation and test")
    image, label = str(columns["Image"]), str(columns["ClassLabel"])
    classes = tuple(sorted(first.features[label].names))
    splits = frozenset(split for _, split in known if split is not None)
    return Table(given, classes, splits, "datasets", tuple(known), image, label)
