"""Initialisation: the standard deviation of every weight by role, and values that do not depend on the parallel layout."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.scheme import SCHEMES, Role
from model.errors import UserError
from model.parameters.shards import Shard, full_shape, take
from model.weights.bases import base_of


@dataclass(frozen=True)
class InitPlan:
    """Standard deviations of all weights. Biases are zero and norm weights one under every scheme.

    layers: for every layer, from q, k, v, o, fc1 (gate and up alike) and fc2 to the standard deviation. word, position, output: of the tables;
    None where the model has none. logit_scale: see the function of that name.
    """

    layers: tuple[Mapping[Role, float], ...]
    word: float
    position: float | None
    output: float | None
    logit_scale: float


def logit_scale(config: ModelConfig) -> float:
    """Factor on the final hidden state [.., h] before the output projection.

    Tied embeddings: 1 / sqrt(h x variance of the word table), so that logits have unit variance at initialisation (Kedia et al. 2024, for any
    dropout and number of tables; under base fairseq this is the 1/sqrt(h) of its repository), except under base normal: 1, as in GPT-2.
    Untied: 1; the projection's own variance is 1/h (base normal: init.std^2).
    """
    base = base_of(config)
    if not (config.tie_embeddings and base.unit_logits):
        return 1.0
    return 1 / math.sqrt(config.hidden_size * base.word(config))


def standard_deviations(config: ModelConfig, seq_length: int) -> InitPlan:
    """Standard deviation of every weight: the base's times the scheme's gain.

    seq_length: training sequence length in tokens, read by base deepscale. Raises UserError where a needed vocabulary size is unknown.
    """
    base = base_of(config)
    gains = SCHEMES[config.scheme].gain_plan(config.num_layers, config.scheme_options)
    variances = base.layers(config, seq_length)
    return InitPlan(
        layers=tuple(
            {role: math.sqrt(value) * gain.get(role, 1.0) for role, value in layer.items()}
            for layer, gain in zip(variances, gains, strict=True)
        ),
        word=math.sqrt(base.word(config)),
        position=math.sqrt(base.position(config)) if config.position == "learned" else None,
        output=None if config.tie_embeddings else math.sqrt(base.output(config)),
        logit_scale=logit_scale(config),
    )


LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
OUTER_NORMS = ("embedding.norm", "decoder.final_layernorm")
LAYER_NORMS = (
    "input_layernorm",
    "pre_mlp_layernorm",
    "self_attention_branch_norm",
    "self_attention_output_norm",
    "mlp_branch_norm",
    "mlp_output_norm",
)
QKV = "self_attention.linear_qkv"
MATRICES: dict[str, Role] = {
    "self_attention.linear_proj": "o",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc2": "fc2",
}


@dataclass(frozen=True)
class Fill:
    """How the whole tensor of one parameter is filled: a constant, or normal values.

    std: one number, or one for each row; None for a constant. rows: rows that are drawn, the others (vocabulary padding) are zero; None means all.
    """

    std: float | Tensor | None
    constant: float = 0.0
    rows: int | None = None


def parameter_fill(name: str, plan: InitPlan, config: ModelConfig) -> Fill:
    """The fill of a parameter by its canonical name. Raises UserError for a name without a role."""
    tables = {
        "embedding.word_embeddings": (plan.word, config.vocab_size),
        "embedding.position_embeddings": (plan.position, None),
        "output_layer": (plan.output, config.vocab_size),
    }
    part, _, kind = name.rpartition(".")
    if kind == "weight" and part in tables and tables[part][0] is not None:
        std, rows = tables[part]
        return Fill(std, rows=rows)
    match = LAYER_NAME.fullmatch(part)
    layer, module = (int(match[1]), match[2]) if match else (0, "")
    known_layer = match is not None and layer < len(plan.layers)
    if part in OUTER_NORMS or (known_layer and module in LAYER_NORMS):
        if kind in ("weight", "bias"):
            return Fill(None, constant=float(kind == "weight"))
    elif known_layer and (module == QKV or module in MATRICES):
        if kind == "bias":
            return Fill(None)
        if kind == "weight":
            return Fill(
                _qkv_rows(plan.layers[layer], config)
                if module == QKV
                else plan.layers[layer][MATRICES[module]]
            )
    raise UserError(
        f"parameter {name!r} has no initialisation in a model of {len(plan.layers)} layers: add its role to model/weights/init.py or fix its name"
    )


def _qkv_rows(layer: Mapping[Role, float], config: ModelConfig) -> Tensor:
    """Standard deviation of each row of the fused projection, [groups (heads per group + 2) d, 1]: a group's queries, its key, its value."""
    width = config.kv_channels
    queries = config.num_attention_heads // config.groups * width
    group = torch.cat(
        [
            torch.full((queries,), layer["q"]),
            torch.full((width,), layer["k"]),
            torch.full((width,), layer["v"]),
        ]
    )
    return group.repeat(config.groups).unsqueeze(1)


def draw(name: str, shape: tuple[int, ...], fill: Fill, seed: int) -> Tensor:
    """The whole tensor of a parameter in float32 on the CPU, from a generator keyed by seed and canonical name alone.

    Raises ValueError where a fill by rows does not fit the shape.
    """
    if fill.std is None:
        return torch.full(shape, fill.constant)
    if isinstance(fill.std, Tensor) and fill.std.shape[0] != shape[0]:
        raise ValueError(
            f"parameter {name!r} has {shape[0]} rows, the configuration gives {fill.std.shape[0]}"
        )
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
    generator = torch.Generator().manual_seed(key)
    # Only real rows are drawn, so that their values do not depend on the padding.
    drawn = shape[0] if fill.rows is None else min(fill.rows, shape[0])
    values = torch.empty((drawn, *shape[1:])).normal_(generator=generator).mul_(fill.std)
    return values if drawn == shape[0] else torch.cat((values, torch.zeros(shape[0] - drawn, *shape[1:])))


@torch.no_grad()
def initialize_(
    parameters: Iterable[tuple[str, Tensor, Shard]], config: ModelConfig, seq_length: int, seed: int
) -> None:
    """Fills parameters in place: bit-identical whole-model values for one seed under any tensor- and pipeline-parallel layout.

    parameters: (canonical name, local tensor of any dtype and device, its place in the whole tensor). Every whole tensor is drawn in float32 on
    the CPU and then cut, so a rank needs host memory for the largest one. Bit identity holds between machines whose torch draws normal
    numbers alike (same processor family and torch release). Parameters on the meta device must be materialised first.
    Raises UserError for a name without a role, ValueError for a meta tensor or a shape that contradicts the configuration.
    """
    plan = standard_deviations(config, seq_length)
    for name, parameter, shard in parameters:
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device: materialise it (to_empty) before initialize_"
            )
        full = draw(name, full_shape(parameter.shape, shard), parameter_fill(name, plan, config), seed)
        parameter.copy_(take(full, shard))
