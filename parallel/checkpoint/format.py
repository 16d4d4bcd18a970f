"""What is in a checkpoint folder: pieces of parameters, and a manifest with checksums."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import xxhash
from pydantic import BeforeValidator, Field

from model.errors import UserError
from model.files import inside
from model.parameters.shards import Shard
from model.records import Record, as_record, read_json, read_record
from parallel.checkpoint.folders import MANIFEST, step_folder
from parallel.optimizers import STATES

FORMAT = 1
STATE_KINDS = ("master", *STATES)
"""What is saved of a parameter: its fp32 weights, and what its optimizer keeps."""
CHECKSUM = "xxh3_64"  # finds damage at the speed of memory; it is no protection against forgery
HASH_BLOCK = 1 << 18
"""Bytes hashed at once: few enough to be still in the cache."""
ADVICE = "use an older checkpoint"
LARGEST_STEP = 10**15

Count = Annotated[int, Field(ge=0, le=1 << 60)]
ShardRow = tuple[Annotated[int, Field(ge=0, le=7)] | None, Count, Count, Count]
Row = tuple[str, Count, Count, Count, Count, tuple[Count, ...], ShardRow]
"""A fragment as it is written."""


@dataclass(frozen=True)
class Fragment:
    """A run of elements that one process owns."""

    name: str
    """Canonical name of the parameter."""
    group: int
    """Which flat tensor of the file the elements lie in."""
    offset: int
    """Where in that flat tensor they begin."""
    start: int
    """Where in the flattened part they begin."""
    length: int
    """How many there are."""
    shape: tuple[int, ...]
    """Shape of the tensor-parallel part."""
    shard: Shard
    """Which part of the whole tensor it is."""

    def row(self) -> Row:
        """As it is written, compactly."""
        shard = self.shard
        cut = (shard.dim, shard.index, shard.count, shard.stride)
        return self.name, self.group, self.offset, self.start, self.length, self.shape, cut


class FileFacts(Record):
    """What a manifest says of a file."""

    bytes: Count
    """Its size."""
    xxh3_64: str
    """Its checksum."""


class SavedProgress(Record):
    """Where a run was. Further keys belong to whoever wrote them."""

    optimizer_step: Count
    """Steps that the optimizer has taken."""
    consumed_tokens: Count | None = None
    """Tokens seen."""
    skipped_in_row: Count | None = None
    """Steps that were left out since the optimizer's last one."""
    recent_steps: list[tuple[float, float]] | None = None
    """Loss and gradient norm of the last steps, where spikes are left out."""


class DataSection(Record):
    """What readers want to know of the data."""

    seq_length: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    source_length: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    document_mask: bool = False
    """Documents that share a sample do not see each other."""
    corpora: list[dict[str, object]] = Field(default_factory=list)
    cache: str | None = None


class TrainSection(Record):
    """What readers want to know of the training."""

    micro_batch_size: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    precision: str | None = None
    fp32_residual: bool | None = None
    seed: int | None = None
    steps: int | None = None
    task: str | None = None
    """None for the family's own."""


class OptimizerSection(Record):
    """What readers want to know of the optimizer."""

    kind: str = "adamw"


class ScheduleSection(Record):
    """What readers want to know of the schedules."""

    branch: dict[str, object] | None = None
    """How branches were warmed up."""


EMPTY = BeforeValidator(lambda given: {} if given is None else given)
"""Reads a section that is null as an empty one."""


class Sections(Record):
    """The configuration of a checkpoint, as far as the types that readers rely on go."""

    name: str | None = None
    """Name of the run."""
    model: dict[str, object] | None = None
    """Fields of ModelConfig."""
    data: Annotated[DataSection, EMPTY] = DataSection()
    train: Annotated[TrainSection, EMPTY] = TrainSection()
    optimizer: Annotated[OptimizerSection, EMPTY] = OptimizerSection()
    schedule: Annotated[ScheduleSection, EMPTY] = ScheduleSection()
    masking: dict[str, object] | None = None
    """How tokens were hidden."""
    spans: dict[str, object] | None = None
    """How parts of a text were hidden."""


class Manifest(Record):
    """What a checkpoint is."""

    step: Annotated[int, Field(ge=0, le=LARGEST_STEP)]
    """Finished steps of the run."""
    time: Annotated[float, Field(ge=0, le=1e11)] | None = None
    """Seconds since 1970 when it was written."""
    world_size: Count
    """Processes that wrote it, 0 for an import."""
    layout: dict[str, int] | None = None
    """Their layout, as `Layout.summary` gives it."""
    files: Annotated[dict[str, FileFacts], Field(min_length=1)]
    """Facts of every file beside the manifest."""
    progress: dict[str, object]
    """Position of the run; at least the keys of SavedProgress."""
    config: dict[str, object]
    """The configuration of the run; Sections has what readers rely on."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    """Versions of packages."""


class Index(Record):
    """What lies where in one file of tensors."""

    fragments: list[Row]
    """The pieces in it."""


def step_manifest(folder: Path, content: Mapping[str, object]) -> Manifest:
    """Parsed content of a manifest as a record.

    Raises UserError naming the key that does not fit, or a folder of another step's name.
    """
    source = str(folder / MANIFEST)
    manifest = as_record(content, Manifest, source, ADVICE)
    saved_progress(folder, manifest)
    sections(folder, manifest)
    if folder.name.startswith("step_") and folder.name != step_folder(manifest.step):
        raise UserError(
            f"{folder} holds the checkpoint of step {manifest.step}, as its {MANIFEST} says: "
            f"rename it to {step_folder(manifest.step)}, or move it away"
        )
    return manifest


def saved_progress(folder: Path, manifest: Manifest) -> SavedProgress:
    """Where the run was. Raises UserError naming the key that does not fit."""
    return as_record(manifest.progress, SavedProgress, f"{folder / MANIFEST}, progress", ADVICE)


def sections(folder: Path, manifest: Manifest) -> Sections:
    """What readers rely on of the configuration. Raises UserError as `saved_progress` does."""
    return as_record(manifest.config, Sections, f"{folder / MANIFEST}, config", ADVICE)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder.

    Raises UserError where it is missing, damaged, of a format this version does not read,
    or of another step than the folder's name says.
    """
    path = inside(folder, MANIFEST)
    try:
        content = read_json(path, ADVICE)
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    if not isinstance(content, dict) or content.get(CHECKSUM) != _seal(content):
        raise UserError(f"{path} is damaged: its content differs from its checksum. Use an older checkpoint")
    if content.get("format") != FORMAT:
        raise UserError(
            f"{folder} has checkpoint format {content.get('format')!r:.40}; this version reads {FORMAT}"
        )
    return step_manifest(folder, content)


def read_index(path: Path) -> list[Fragment]:
    """The pieces that a file of tensors holds, from the index beside it.

    Raises UserError for an index that contradicts itself.
    """
    return [_fragment(row, path) for row in read_record(path, Index, ADVICE).fragments]


def _fragment(row: Row, path: Path) -> Fragment:
    name, group, offset, start, length, shape, cut = row
    try:
        shard = Shard(*cut)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {ADVICE}") from None
    size = 1
    for extent in shape:
        size *= extent
    if (shard.dim is not None and shard.dim >= len(shape)) or start + length > size:
        raise UserError(f"{path} is damaged (a piece of {name!r:.80} lies outside of its shape): {ADVICE}")
    return Fragment(name, group, offset, start, length, shape, shard)


def file_hash(path: Path) -> str:
    """Checksum of a file, by the method `CHECKSUM`."""
    digest, block = xxhash.xxh3_64(), memoryview(bytearray(HASH_BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def file_facts(path: Path) -> FileFacts:
    """Size and checksum of a file, for a manifest."""
    return FileFacts(bytes=path.stat().st_size, xxh3_64=file_hash(path))


def manifest_text(manifest: Mapping[str, object]) -> str:
    """A manifest as it is written, sealed with a checksum of its own content."""
    return json.dumps({**manifest, CHECKSUM: _seal(manifest)}, indent=1)


def _seal(manifest: Mapping[str, object]) -> str:
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    # Read back first, so that what is sealed is what a reader will see (tuples are lists there).
    return xxhash.xxh3_64_hexdigest(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode())
