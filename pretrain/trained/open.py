"""Checkpoints as models, opened without Megatron and without a process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.words import printable
from parallel.checkpoint.audit import saved_model
from parallel.checkpoint.folders import MANIFEST
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint
from pretrain.config.schema import BranchConfig, Corpus

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What a model is asked for, by its stacks."""

    name: str
    """With what it does."""
    command: str
    """That asks it; empty where none does."""


DECODER = Kind("a decoder, which continues a text", "fathom generate")
ENCODER = Kind("an encoder, which fills places in a text", "fathom fill")
IMAGES = Kind("an encoder of images, which tells their classes", "fathom eval")
SPEECH = Kind("a model of speech, which writes what it hears", "fathom transcribe")
BOTH = Kind("an encoder-decoder, which translates a text", "fathom translate")


def kind_of(config: ModelConfig) -> Kind:
    """What a model is asked for."""
    family = config.blueprint
    others = {"patches": IMAGES, "frames": SPEECH}
    if family.inputs in others:
        return others[family.inputs]
    if family.crossed:
        return BOTH
    return DECODER if family.stacks[-1].causal else ENCODER


def check_kind(config: ModelConfig, wanted: Kind, folder: str) -> None:
    """Raises UserError for the model of a folder that is of another kind than wanted."""
    kind = kind_of(config)
    if kind is not wanted:
        use = f"use `{kind.command}`, " if kind.command else ""
        raise UserError(
            f"{folder} holds {kind.name}: {use}`{wanted.command}` is for {wanted.name.partition(',')[0]}"
        )


def is_export(model: Path | str) -> bool:
    """Whether a folder is one in Hugging Face format, such as `fathom export` writes."""
    return (Path(model) / "config.json").is_file()


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint."""

    reader: CheckpointReader
    config: ModelConfig
    weights: Mapping[str, Tensor]
    """Canonical names, fp32, read at each access."""
    logit_scale: float
    positions: int
    """The longest sequence."""
    source_positions: int | None
    """The longest sequence of an encoder under a decoder; None where there is none."""
    tokenizer: Path | None

    @property
    def name(self) -> str:
        """Name of the run, or of the folder where the checkpoint names none."""
        return self.reader.sections.name or self.reader.folder.name

    @property
    def row_lengths(self) -> tuple[int, int]:
        """Tokens of the two sides of a row in training, of an encoder-decoder."""
        data = self.reader.sections.data
        source = data.source_length or self.source_positions
        assert source is not None  # of every encoder under a decoder
        return source, data.seq_length or self.positions

    @property
    def warmup(self) -> BranchConfig:
        """How the branches came in; no warm-up where the checkpoint does not tell."""
        given = self.reader.sections.schedule.branch or {}
        try:
            return BranchConfig.model_validate(given)
        except ValidationError as error:
            said = printable(error.errors()[0]["msg"])
            raise UserError(
                f"{self.reader.folder / MANIFEST} is damaged (schedule.branch: {said}): "
                "use another checkpoint"
            ) from None

    @property
    def kind(self) -> Kind:
        """What it is asked for."""
        return kind_of(self.config)

    def check_kind(self, wanted: Kind) -> None:
        """Raises UserError for a model of another kind, which another command asks."""
        check_kind(self.config, wanted, str(self.reader.folder))

    def needed_tokenizer(self) -> Path:
        """The tokenizer's file. Raises UserError where the checkpoint has none."""
        if self.tokenizer is None:
            raise UserError(f"{self.reader.folder} has no tokenizer: put the tokenizer of its data there")
        return self.tokenizer

    def check_warm(self) -> None:
        """Raises UserError while the branches are being warmed up.

        Until then the model is not that of its scheme.
        """
        last = self.warmup.last_step(self.config.num_layers)
        if self.reader.step < last:
            raise UserError(
                f"{self.reader.folder}: the warm-up of the branches "
                f"(schedule.branch.kind={self.warmup.kind}) is not over at step {self.reader.step}, "
                f"it ends at step {last}: use a checkpoint from there on"
            )

    def corpora(self) -> list[Corpus]:
        """The data sets that it was trained on.

        Raises UserError where the checkpoint does not name them.
        """
        source = self.reader.folder / MANIFEST
        try:
            found = [Corpus.model_validate(one) for one in self.reader.sections.data.corpora]
        except ValidationError as error:
            first = error.errors()[0]
            key = printable(".".join(map(str, ("data.corpora", *first["loc"]))))
            raise UserError(
                f"{source} is damaged ({key}: {printable(first['msg'])}): name a data set with --data"
            ) from None
        if not found:
            raise UserError(
                f"{source} does not say what the model was trained on: "
                "name a data set with --data, or files with --text"
            )
        return found


def open_trained(checkpoint: Path | str, reader_of: str = "") -> Trained:
    """Opens a run folder, a `checkpoints` folder or a step folder.

    reader_of: what is done with it, where that needs a model that is a decoder alone.

    Raises UserError where there is no checkpoint, it is damaged, its vocabulary size is not known,
    or it does not hold the model that it describes.
    """
    from model.weights.init import logit_scale

    reader = open_checkpoint(checkpoint)
    model = saved_model(reader)
    family = model.config.blueprint
    if reader_of and (family.crossed or not family.stacks[-1].causal):
        raise UserError(
            f"{reader.folder}: {reader_of} needs a decoder alone, which reads from left to right, "
            f"and this one is of model.family={model.config.family}"
        )
    return Trained(
        reader,
        model.config,
        reader.weights(),
        logit_scale(model.config),
        model.positions,
        model.source_positions,
        reader.tokenizer_path,
    )
