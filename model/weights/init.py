"""Initialisation: the standard deviation of every weight by role, and the values.

Values do not depend on the parallel layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.scheme import CROSS, WeightRole
from model.depth.schemes import SCHEMES
from model.parameters.blocks import Blocks
from model.parameters.shards import Shard, full_shape, take
from model.parameters.table import CONVOLUTIONS, Role, Row, parameter_table
from model.speech import KERNEL
from model.weights.bases import Base, Lengths, base_of, fixed_position_variance
from model.weights.unigram import Override, overrides


@dataclass(frozen=True)
class Convolutions:
    """Standard deviations of what makes tokens of frames: tokens get the variance of words.

    All pre-activations have mean square 1, but for the values that the last gate lets through.
    """

    first: float
    values: float
    """Of those rows of the second convolution whose results are let through."""
    gates: float
    """Of those rows that tell how much."""


@dataclass(frozen=True)
class Deviations:
    """Standard deviations of all weights. Biases are zero and norm gains one under every scheme."""

    layers: tuple[Mapping[WeightRole, float], ...]
    """Of every layer by role, stack after stack; a gate and its up projection are fc1 alike."""
    word: float
    position: float | None
    """None where the model has no table of positions."""
    token_type: float | None
    """None where the model has no table of token types."""
    dense: float
    """Of the dense layer of a head."""
    output: float | None
    """None where the word embedding is the output projection."""
    logit_scale: float
    """See the function of that name."""
    patch: float | None = None
    """Of the map of patches, which gives tokens the variance of words; None where there is none."""
    class_token: float | None = None
    """None where the model has no such token."""
    frames: Convolutions | None = None
    """None where the model reads no frames."""


def logit_scale(config: ModelConfig) -> float:
    """Factor on the final hidden state [.., h] before the output projection.

    Tied embeddings: 1 / sqrt(h x variance of the word table), so that logits have unit variance at
    initialisation (Kedia et al. 2024, for any dropout and number of tables; under base fairseq this
    is the 1/sqrt(h) of its repository), except under base normal: 1, as in GPT-2.
    Untied: 1; the projection's own variance is 1/h (base normal: init.std^2).
    With transfer h is the base's width, and the whole is divided by the width over that.
    """
    base = base_of(config)
    if not (config.tie_embeddings and base.unit_logits):
        return 1.0 / config.wider
    return 1 / math.sqrt(config.base_width * base.word(config)) / config.wider


def standard_deviations(config: ModelConfig, seq_length: int, source_length: int | None = None) -> Deviations:
    """Standard deviation of every weight: the base's times the scheme's gain.

    seq_length: training sequence length in tokens, read by base deepscale.
    source_length: the same of an encoder under a decoder.
    Raises UserError where a needed vocabulary size is unknown.
    """
    base = base_of(config)
    variances = base.layers(config, Lengths(seq_length, source_length))
    return Deviations(
        layers=tuple(
            {role: math.sqrt(value) * gain.get(role, 1.0) for role, value in layer.items()}
            for layer, gain in zip(variances, _gains(config), strict=True)
        ),
        word=math.sqrt(base.word(config)),
        position=math.sqrt(base.position(config)) if config.position == "learned" else None,
        token_type=math.sqrt(base.token_type(config)) if config.token_types else None,
        dense=math.sqrt(base.dense(config)),
        output=None if config.tie_embeddings else _output(config, base),
        logit_scale=logit_scale(config),
        patch=_patch(config, base),
        class_token=_class_token(config, base),
        frames=_frames(config, base),
    )


def _output(config: ModelConfig, base: Base) -> float:
    zero = config.image is not None and config.image.zero_head
    return 0.0 if zero else math.sqrt(base.output(config))


def _patch(config: ModelConfig, base: Base) -> float | None:
    """Pixels have mean 0 and variance 1."""
    return None if config.image is None else math.sqrt(base.word(config) / config.image.patch_numbers)


def _frames(config: ModelConfig, base: Base) -> Convolutions | None:
    """Frames have mean 0 and variance 1."""
    if config.speech is None:
        return None
    told, (entering, inner) = config.speech.known_moments, (KERNEL * n for n in config.speech.widths)
    gates = 1 / (inner * told.middle)
    return Convolutions(
        first=math.sqrt(1 / (entering * told.entering)),
        values=math.sqrt(gates * base.word(config) / told.leaving),
        gates=math.sqrt(gates),
    )


def _class_token(config: ModelConfig, base: Base) -> float | None:
    """Without a position of its own it has the variance of one besides."""
    if config.image is None or not config.image.class_token:
        return None
    return math.sqrt(base.word(config) + fixed_position_variance(config))


def _gains(config: ModelConfig) -> list[Mapping[WeightRole, float]]:
    """The scheme's, of all layers in the order of the stream, each by its own stack's depth."""
    found: list[Mapping[WeightRole, float]] = []
    depths = {stack.name: config.of(stack).num_layers for stack in config.blueprint.stacks}
    for stack in config.blueprint.stacks:
        other = next((depth for name, depth in depths.items() if name != stack.name), None)
        found += SCHEMES[config.scheme].gain_plan(
            depths[stack.name], config.scheme_options, stack.sublayers, other
        )
    return found


@dataclass(frozen=True)
class Fill:
    """How the whole tensor of one parameter is filled: with a constant, or with normal values."""

    std: float | Tensor | None
    """One number, or one for each row [rows, 1]; None for a constant."""
    constant: float = 0.0
    rows: int | None = None
    """Rows that are drawn; the others, the vocabulary's padding, are zero. None means all."""
    override: Override | None = None
    """What stands at some places instead."""


def parameter_fill(row: Row, planned: Deviations, config: ModelConfig) -> Fill:
    """How a parameter is filled. Raises ValueError for a role without a rule."""
    if row.role is Role.NORM_GAIN:
        return Fill(None, constant=1.0)
    if row.role in (Role.NORM_BIAS, Role.LINEAR_BIAS, Role.LOGIT_BIAS, Role.GATE):
        return Fill(None)
    if row.role is Role.WORD:
        return Fill(planned.word, rows=config.vocab_size)
    if row.role is Role.POSITION:
        return Fill(planned.position)
    if row.role is Role.TOKEN_TYPE:
        return Fill(planned.token_type)
    if row.role is Role.PATCH:
        return Fill(planned.patch)
    if row.role is Role.CLASS_TOKEN:
        return Fill(planned.class_token)
    if row.role is Role.FRAMES:
        return _fill_of_frames(row, planned.frames)
    if row.role is Role.DENSE:
        return Fill(planned.dense)
    if row.role is Role.OUTPUT:
        return Fill(planned.output, rows=config.vocab_size)
    if row.blocks is None or row.layer is None:
        raise ValueError(f"parameter {row.name!r} is a {row.role.value}, which has no initialisation")
    layer = planned.layers[row.layer]
    if row.sublayer == "cross":
        layer = {role: layer[CROSS[role]] for role in row.blocks.roles}
    return Fill(_block_deviations(row.blocks, row.shape[0], layer))


def _fill_of_frames(row: Row, planned: Convolutions | None) -> Fill:
    assert planned is not None
    if row.module == CONVOLUTIONS[0]:
        return Fill(planned.first)
    values, gates = torch.tensor([planned.values, planned.gates])
    return Fill(torch.cat((values.expand(row.shape[0] // 2, 1), gates.expand(row.shape[0] // 2, 1))))


def _block_deviations(blocks: Blocks, rows: int, layer: Mapping[WeightRole, float]) -> float | Tensor:
    """Standard deviation of a matrix, or of each of its rows [rows, 1] where it holds several."""
    if len(blocks.roles) == 1:
        return layer[blocks.roles[0]]
    values = torch.empty(rows, 1)
    for role, view in blocks.by_role(values).items():
        view.fill_(layer[role])
    return values


def draw(name: str, shape: tuple[int, ...], fill: Fill, seed: int) -> Tensor:
    """The whole tensor of a parameter, in float32 on the CPU.

    Its generator is keyed by seed and canonical name alone.
    """
    values = _drawn(name, shape, fill, seed)
    if fill.override is not None:
        values[fill.override.index] = fill.override.values.float()
    return values


def _drawn(name: str, shape: tuple[int, ...], fill: Fill, seed: int) -> Tensor:
    if fill.std is None:
        return torch.full(shape, fill.constant)
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
    generator = torch.Generator().manual_seed(key)
    # Only real rows are drawn, so that their values do not depend on the padding.
    drawn = shape[0] if fill.rows is None else min(fill.rows, shape[0])
    values = torch.empty((drawn, *shape[1:])).normal_(generator=generator).mul_(fill.std)
    return values if drawn == shape[0] else torch.cat((values, torch.zeros(shape[0] - drawn, *shape[1:])))


@torch.no_grad()
def initialize_(
    parameters: Iterable[tuple[str, Tensor, Shard]],
    config: ModelConfig,
    seq_length: int,
    seed: int,
    log_p_v: Tensor | None = None,
    *,
    source_length: int | None = None,
) -> None:
    """Fills parameters in place.

    Whole-model values are bit-identical for one seed under every tensor- and pipeline-parallel
    layout, between machines whose torch draws normal numbers alike (same processor family and
    torch release).

    parameters: (canonical name, local tensor of any dtype and device, its place in the whole).
    Every whole tensor is drawn in float32 on the CPU and then cut, so that a rank needs host memory
    for the largest one. Parameters on the meta device must be materialised first.
    log_p_v: log frequencies of the training tokens, float64, read with `init.unigram` only.
    source_length: as in `standard_deviations`.
    Raises ValueError where they are needed and missing, for a name that is not in the model's
    table, a meta tensor, or a shape that contradicts the configuration.
    """
    planned = standard_deviations(config, seq_length, source_length)
    instead = _overrides(config, planned, log_p_v)
    rows = parameter_table(config, positions=seq_length, source_positions=source_length)
    table = {row.name: row for row in rows}
    for name, parameter, shard in parameters:
        row = table.get(name)
        if row is None:
            raise ValueError(f"parameter {name!r} is not in the table of this model's parameters")
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device: materialise it (to_empty) before initialize_"
            )
        shape = full_shape(parameter.shape, shard)
        if shape != row.shape:
            raise ValueError(f"parameter {name!r} has shape {shape}, the configuration gives {row.shape}")
        fill = replace(parameter_fill(row, planned, config), override=instead.get(name))
        parameter.copy_(take(draw(name, shape, fill, seed), shard))


def _overrides(config: ModelConfig, planned: Deviations, log_p_v: Tensor | None) -> dict[str, Override]:
    if not config.init.unigram:
        return {}
    if log_p_v is None:
        raise ValueError("model.init.unigram needs the log frequencies of the training tokens")
    return overrides(config, planned.logit_scale, log_p_v)
