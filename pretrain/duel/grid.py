"""A duel of depth schemes: the same model trained under several schemes, depths, rates and
warm-ups.

Each cell is a run with a folder of its own (`workers.py` trains them).
A cell that is finished is never trained again, one that was cut off continues from its checkpoint:
the same command resumes the duel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.config import ModelConfig
from model.errors import UserError
from model.parameters.size import parameter_count
from model.records import Record, read_record
from model.words import printable, written
from parallel.launch.exit_codes import ExitCode
from pretrain.config.compose import COMMAND_LINE, Composition
from pretrain.config.errors import checked
from pretrain.config.load import complete_model, dump_config, explained
from pretrain.config.schema import RunConfig
from pretrain.config.scheme_choice import Variant, validated

Equal = Literal["tokens", "parameters"]
RESULT, CELLS = "cell.json", "cells"
"""A file of a cell that has ended, and the folder of all cells in that of a duel."""
DONE = (ExitCode.FINISHED, ExitCode.DIVERGED)
WITHOUT_EFFECT = {
    "parallel.": "train on one process each",
    "checkpoint.load": "begin untrained",
    "train.stop_at_step": "train to their end",
}
"""Beginnings of keys that cells have values of their own for, and why."""
TYPED_WITHOUT_EFFECT = {
    "name": "have names of their own",
    "runs_dir": "have folders of their own, below --out",
    "checkpoint.": "keep what they need to go on",
    "log.": "keep what the page shows",
}
"""The same of keys that files for other trainings have too: refused only where they are typed."""
# Learned from this share on, whatever the depth: a width further off is no longer the same budget.
PARAMETER_TOLERANCE = 0.15


@dataclass(frozen=True)
class Cell:
    """One training. warmup: share of the steps."""

    variant: Variant
    layers: int
    lr: float
    warmup: float
    seed: int

    @property
    def name(self) -> str:
        """Folder of the cell."""
        return (
            f"{self.variant.slug}_{self.layers}_layers_lr{self.lr:g}_warmup{self.warmup:g}_seed{self.seed}"
        ).replace("+", "")

    @property
    def words(self) -> str:
        """The cell for a line of progress."""
        return (
            f"{self.variant.text}, {self.layers} layers, "
            f"lr {self.lr:g}, warm-up {self.warmup:.0%}, seed {self.seed}"
        )


@dataclass(frozen=True)
class Grid:
    """Every choice of a duel. lrs: peak rates; warmups: shares of the steps; equal: what is kept
    over depths, see `sized`.
    """

    variants: Sequence[Variant]
    layers: Sequence[int]
    lrs: Sequence[float]
    warmups: Sequence[float]
    seeds: Sequence[int]
    equal: Equal = "tokens"

    def cells(self) -> list[Cell]:
        """All cells, schemes innermost, so that an unfinished duel compares all of them at its
        first settings.
        """
        return [
            Cell(variant, layers, lr, warmup, seed)
            for seed in self.seeds
            for warmup in self.warmups
            for lr in self.lrs
            for layers in self.layers
            for variant in self.variants
        ]


OWN_SIZES = ("encoder_attention_heads", "encoder_ffn_hidden_size")


def sized(model: ModelConfig, layers: int, equal: Equal) -> ModelConfig:
    """The model at another depth, which is that of both stacks of an encoder-decoder.

    tokens: the same width, so that deeper models have more parameters. parameters: the number of
    heads (of unchanged width) whose model comes nearest to the given one's parameters.
    Both train on the same tokens.
    Raises UserError where no width comes near, or an encoder has sizes of its own.
    """
    depth = {"num_layers": layers, "encoder_layers": None}
    if equal == "tokens":
        return model.model_copy(update=depth)
    if own := [key for key in OWN_SIZES if getattr(model, key) is not None]:
        raise UserError(
            "--equal parameters finds one width for both stacks, "
            f"and model.{own[0]}={getattr(model, own[0])} gives the encoder sizes of its own: "
            "remove it, or use --equal tokens"
        )
    validated(model.model_dump() | depth, f"{layers} layers: ")
    wanted = parameter_count(model)["total"]
    ratio = model.ffn_size / model.hidden_size

    def with_heads(heads: int) -> ModelConfig:
        hidden = round(heads * model.hidden_size / model.num_attention_heads)
        ffn = None if model.ffn_hidden_size is None else round(ratio * hidden)
        return model.model_copy(
            update={
                **depth,
                "num_attention_heads": heads,
                "hidden_size": hidden,
                "ffn_hidden_size": ffn,
            }
        )

    step = model.groups if model.num_query_groups else 1
    low, high = 1, 64 * model.num_attention_heads  # in units of `step`; the count grows with the heads
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle)
            if parameter_count(with_heads(middle * step))["total"] >= wanted
            else (middle + 1, high)
        )
    nearest = [with_heads(heads * step) for heads in (low - 1, low) if heads]
    best = min(nearest, key=lambda one: abs(math.log(parameter_count(one)["total"] / wanted)))
    found = parameter_count(best)["total"]
    if abs(found / wanted - 1) > PARAMETER_TOLERANCE:
        raise UserError(
            f"--equal parameters: no model of {layers} layers with heads of "
            f"width {model.kv_channels} has about {wanted:,} parameters (nearest: "
            f"{found:,}): use more and narrower heads, or --equal tokens"
        )
    return best


def cell_config(base: RunConfig, cell: Cell, equal: Equal, folder: Path) -> RunConfig:
    """The run of a cell, on one process. base: with the vocabulary of its data.

    Raises UserError where scheme, depth or batch do not fit.
    """
    model = cell.variant.apply(sized(base.model, cell.layers, equal))
    values = base.model_dump()
    values |= {"name": cell.name, "runs_dir": str(folder / CELLS), "model": model.model_dump()}
    values["parallel"] = {"recompute": values["parallel"]["recompute"]}
    values["optimizer"]["lr"] = cell.lr
    factors = cell.variant.apply_factors(base.model, base.optimizer.factors)
    values["optimizer"]["factors"] = factors.model_dump()
    values["schedule"]["warmup_steps"] = round(cell.warmup * base.train.steps)
    values["train"] |= {"seed": cell.seed, "stop_at_step": None}
    values["checkpoint"] |= {"keep_last": 1, "keep_every": 0, "load": None}
    # Whatever else keeps metrics is off: a cell has its own files.
    values["log"] = {"signal_interval": values["log"]["signal_interval"], "interval": 1}
    values["log"] |= {"tensorboard": False, "progress": "none"}
    config = checked(RunConfig, values, f"cell {printable(cell.name)}: ")
    # Some schemes take more from the data than the scheme of `base` does.
    config.model = complete_model(config, base.model.vocab_size)
    return config


def check_effect(base: RunConfig, cell: RunConfig, origins: Composition) -> None:
    """Raises UserError naming the first setting of `base` that no cell has.

    cell: one of those made from `base`. origins: where the settings came from.
    """
    own = {row.key: row.value for row in explained(cell)}
    for row in explained(base, origins):
        typed = row.source == COMMAND_LINE
        places = WITHOUT_EFFECT | (TYPED_WITHOUT_EFFECT if typed else {})
        why = next((why for place, why in places.items() if row.key.startswith(place)), None)
        alone = row.key == "parallel.processes" and row.value == 1
        if why and row.value != own.get(row.key) and (typed or row.changed) and not alone:
            advice = "leave it out" if typed else f"set {row.key}={written(row.default)}"
            raise UserError(
                f"{row.key}={written(row.value)} has no effect in a duel, whose cells {why}: {advice}"
            )


class CellResult(Record):
    """How the training of a cell ended."""

    name: str
    code: int
    """As a process would exit."""
    reason: str
    seconds: float


def finished(folder: Path) -> CellResult | None:
    """The result of a cell's folder, or None while it is not trained to its end."""
    try:
        result = read_record(folder / RESULT, CellResult, "it is trained again")
    except (OSError, UserError):
        return None
    return result if result.code in DONE else None


def check_unchanged(configs: Sequence[RunConfig]) -> None:
    """Raises UserError where a cell's folder holds a run of other settings than the one that is
    wanted now.
    """
    for config in configs:
        path = Path(config.runs_dir) / config.name / "config.yaml"
        if path.is_file() and path.read_text(encoding="utf-8") != dump_config(config):
            raise UserError(
                f"{path} was written by a duel with other settings: "
                f"give another --out, or remove {path.parent}"
            )
