"""What a file holds, by its name and its first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pretrain.data.reading.compressed import compression

Kind = Literal["text", "json", "csv", "parquet", "hub"]
FILE_KINDS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
NOT_TEXT = (
    ("an archive: unpack it first", "7z ar cab deb iso jar rar rpm tar tbz tbz2 tgz txz tzst whl zip"),
    (
        "compressed in a way that is not read here: use .gz, .bz2, .xz or .zst",
        "br lz lz4 lzma lzo snappy sz z",
    ),
    (
        "a table that is not read here: write it as Parquet or JSON lines",
        "arrow avro db dta feather h5 hdf5 ods orc rds sas7bdat sqlite sqlite3 xls xlsx",
    ),
    (
        "a document that is more than text: take the text out first",
        "djvu doc docx epub mobi odp odt pdf ppt pptx",
    ),
    (
        "no text but an image, sound or video",
        "aac avi bmp flac gif heic ico jpeg jpg m4a mkv mov mp3 mp4 ogg opus png psd tif tiff wav webm webp",
    ),
    (
        "no text but numbers or machine code",
        "a bin class dll dylib exe idx mat npy npz o onnx pickle pkl pt pth pyc safetensors so wasm",
    ),
)
"""What is wrong with a file, and the suffixes of such files."""
REASONS = {f".{suffix}": reason for reason, suffixes in NOT_TEXT for suffix in suffixes.split()}
HEAD = 16
"""Bytes by which a file is known that is not what its name says."""
MAGIC = {
    b"\x1f\x8b": "gzip data: name it .gz",
    b"BZh": "bzip2 data: name it .bz2",
    b"\xfd7zXZ\0": "xz data: name it .xz",
    b"\x28\xb5\x2f\xfd": "zstandard data: name it .zst",
    b"PAR1": "Parquet: name it .parquet",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"%PDF-": "a PDF document: take the text out first",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it",
}
"""First bytes of a file -> what it is, where its name says otherwise."""
RECORDS = frozenset({".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow"})
"""Files that hold documents as records. `.json` may, and may as well be settings."""
DESCRIPTIONS = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"})


def inner_suffix(path: str | Path) -> str:
    """The suffix of a file's content in small letters: that before the compression's, if any."""
    path = Path(path)
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


def kind_of(path: str | Path) -> Kind:
    """How a file is read; text is whatever has no suffix of its own."""
    return FILE_KINDS.get(inner_suffix(path), "text")


def not_text(path: str | Path) -> str:
    """Why a file of this name is not read; empty for one that is."""
    path = Path(path)
    return REASONS.get(path.suffix.lower()) or REASONS.get(inner_suffix(path), "")


def descriptions(files: list[Path]) -> set[Path]:
    """Which of a folder's files only describe the data beside or below them.

    That is a README, a licence and what the `datasets` library writes, above files of records.
    """
    candidates = {path for path in files if _may_describe(path)}
    records, json, documents = (
        {parent for path in files if test(path) and path not in candidates for parent in path.parents}
        for test in (
            _holds_records,
            lambda path: kind_of(path) == "json",
            lambda path: kind_of(path) == "text",
        )
    )
    data = records | (json - documents)
    return {path for path in candidates if path.parent in data}


def _may_describe(path: Path) -> bool:
    return path.name.lower() in DESCRIPTIONS or path.stem.lower() in ("readme", "license", "licence")


def _holds_records(path: Path) -> bool:
    return inner_suffix(path) in RECORDS


def looks_like(head: bytes) -> str:
    """What the first bytes of a file are, where they are no text; empty for text."""
    known = next((reason for magic, reason in MAGIC.items() if head.startswith(magic)), "")
    return f"looks like {known}" if known else ""
