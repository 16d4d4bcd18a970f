"""Every tensor of a model, canonical <-> Hugging Face: names, shapes, conversions, both ways."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.names.conversions import (
    BIAS_ROW,
    FINAL_BIAS,
    GATE_UP,
    NORM_LAYER_GAIN,
    PLAIN,
    VOCABULARY,
    Conversion,
    Target,
)
from model.hf.names.tables import BARE, FATHOM_CROSSED, LOGIT_BIAS_HF, MARIAN_APART, SHOWN, TABLES, Rule
from model.parameters.table import Role, Row, parameter_table
from model.weights.bases import sinusoid_scale


@dataclass(frozen=True)
class Entry:
    """One canonical tensor and the Hugging Face tensors made of it."""

    canonical: str
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    conversion: Conversion
    constant: float | Tensor | None = None
    """The model has no such tensor, and the target wants this number, or these, there."""

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Shapes of the Hugging Face tensors."""
        return {
            name: tuple(t.shape)
            for name, t in zip(
                self.hf, self.conversion.to_hf(torch.empty(self.shape, device="meta"), config), strict=True
            )
        }


def last_norm(config: ModelConfig) -> str:
    """The norm before the output projection: the head's, or that after the stack."""
    return "head.norm" if config.head_transform else config.blueprint.stacks[-1].final_norm


def norm_layers(target: Target, config: ModelConfig) -> tuple[bool, bool]:
    """Whether the norm (after the embedding, after the stack) becomes a layer of its own.

    That is an OPT layer whose branches are zero.
    """
    if target != "opt":
        return False, False
    plan = config.depth_plan()
    return plan.embedding_norm, plan.final_norm


def _table(target: Target, config: ModelConfig) -> dict[str, Rule]:
    if target == "marian" and not config.share_embeddings:
        return MARIAN_APART
    return FATHOM_CROSSED if target == "fathom" and config.blueprint.crossed else TABLES[target]


def _shown(target: Target, config: ModelConfig) -> ModelConfig:
    """The model with what the target always has."""
    shown = SHOWN.get(target, {})
    if shown.get("position") == "learned" and config.position == "sinusoidal":
        # One length for both tables, which hold what the model computes.
        longest = max(config.max_position_embeddings or 0, config.max_source_positions or 0)
        shown = {**shown, "max_position_embeddings": longest, "max_source_positions": longest}
    return config.model_copy(update=shown)


def _within(conversion: Conversion, own: ModelConfig) -> Conversion:
    """The conversion with the sizes of one of several stacks."""
    return Conversion(
        lambda t, config: conversion.to_hf(t, own), lambda parts, config: conversion.from_hf(parts, own)
    )


def entries(
    target: Target, config: ModelConfig, positions: int, source_positions: int | None = None
) -> list[Entry]:
    """The whole mapping of one model to one target.

    positions, source_positions: rows of a learned position table, and of an encoder's under it.
    Raises KeyError for a tensor the target has no home for; `folding.obstacle` tells beforehand.
    """
    lengths = {"positions": positions, "source_positions": source_positions}
    own = {row.name: row for row in parameter_table(config, **lengths)}
    shown, table = _shown(target, config), _table(target, config)
    stacks = config.blueprint.stacks
    sizes = {stack.name: config.of(stack) for stack in stacks[:-1]}
    first, last = norm_layers(target, config)
    places = {"embedding.norm": 0} if first else {}
    if last:
        places[stacks[-1].final_norm] = config.num_layers + first
    result = []
    for row in parameter_table(shown, **lengths):
        constant = None if row.name in own else _constant(row, config)
        if row.role is Role.LOGIT_BIAS:
            conversion = BIAS_ROW if target in FINAL_BIAS else VOCABULARY
            result.append(Entry(row.name, row.shape, (LOGIT_BIAS_HF[target],), conversion, constant))
            continue
        if row.module in BARE.get(target, {}):
            names, conversion = BARE[target][row.module]
            result.append(Entry(row.name, row.shape, names, conversion))
            continue
        module, number = _rule_name(row), "" if row.layer is None else str((row.index or 0) + first)
        if row.module in places:
            if row.leaf == "weight":
                result += _norm_layer(own.values(), places[row.module])
            module, number = "decoder.layers.{i}.mlp_output_norm", str(places[row.module])
        names, conversion = table[module]
        if conversion is GATE_UP and not config.gated:
            names, conversion = names[1:], PLAIN
        if row.stack in sizes:
            conversion = _within(conversion, sizes[row.stack])
        hf = tuple(f"{name.replace('{i}', number)}.{row.leaf}" for name in names)
        result.append(Entry(row.name, row.shape, hf, conversion, constant))
    return result


def _constant(row: Row, config: ModelConfig) -> float | Tensor:
    """What a target has in a tensor that the model lacks."""
    if row.role is not Role.POSITION or config.position != "sinusoidal":
        return 0.0
    return fixed_positions(config, row.shape[0]).float()


def fixed_positions(config: ModelConfig, rows: int) -> Tensor:
    """[rows, h] in fp64: sines of all frequencies, then cosines, as they are added to words."""
    width = config.hidden_size
    form = config.blueprint.sinusoid
    frequencies = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / form.steps(width))
    angles = torch.outer(form.first + torch.arange(rows, dtype=torch.float64), frequencies)
    return sinusoid_scale(config) * torch.cat((angles.sin(), angles.cos()), dim=-1)


def _rule_name(row: Row) -> str:
    return row.module if row.layer is None else f"{row.stack}.layers.{{i}}.{row.module}"


def _norm_layer(rows: Iterable[Row], number: int) -> list[Entry]:
    """What makes OPT's layer `number` a norm, but for its last norm, which is the norm itself.

    See `model/hf/folding/post_ln.py`.
    """
    result = []
    for row in rows:
        if row.layer != 0 or row.module == "mlp_output_norm":
            continue
        names, conversion = TABLES["opt"][_rule_name(row)]
        hf = tuple(f"{name.replace('{i}', str(number))}.{row.leaf}" for name in names)
        constant = NORM_LAYER_GAIN if row.role is Role.NORM_GAIN else 0.0
        result.append(Entry(f"norm layer {number}: {row.name}", row.shape, hf, conversion, constant))
    return result


def check_weights(weights: Iterable[str], names: Collection[str]) -> None:
    """Raises UserError naming the first canonical tensor that is missing, or is not the model's."""
    given = set(weights)
    for name in names:
        if name not in given:
            raise UserError(
                f"the weights have no tensor {name!r}, which this model configuration needs: "
                "is this the checkpoint's own configuration?"
            )
    for name in sorted(given - set(names)):
        raise UserError(
            f"the weights have a tensor {name!r}, which this model configuration has no place for: "
            "is this the checkpoint's own configuration?"
        )


class CanonicalWeights(Mapping[str, Tensor]):
    """Hugging Face tensors seen under canonical names; each is converted when it is read.

    Names and shapes are those of the entries.
    Reading raises UserError for values that fp32 does not hold.
    """

    def __init__(self, hf: Mapping[str, Tensor], todo: Iterable[Entry], config: ModelConfig) -> None:
        self._hf, self._config = hf, config
        self._entries = {entry.canonical: entry for entry in todo}

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        parts = tuple(_in_fp32(part, self._hf[part]) for part in entry.hf)
        return entry.conversion.from_hf(parts, self._config).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _in_fp32(name: str, tensor: Tensor) -> Tensor:
    """The same numbers in fp32. Raises UserError where they are not finite, or not the same."""
    if not tensor.isfinite().all():
        raise UserError(f"{name} has values that are not finite (NaN or infinity): the model is damaged")
    single = tensor.float()
    if tensor.dtype == torch.float64 and not torch.equal(single.double(), tensor):
        raise UserError(
            f"{name} is stored in float64, with values that float32 does not hold exactly: "
            "round it with transformers (model.float().save_pretrained) if that is what you want"
        )
    return single
