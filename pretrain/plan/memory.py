"""Memory of one rank by part, as the engine lays it out: weights, gradients, optimizer state, activations, buffers. All in bytes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from model.config import ModelConfig
from model.cost.activations import FP32, Activations, Norms, norms_of
from model.depth.scheme import SCHEMES
from model.parameters.size import parameter_shapes
from parallel.topology import Layout

CUT = (
    "word_embeddings",
    "output_layer",
    "linear_qkv",
    "linear_fc1",
    "linear_proj.weight",
    "linear_fc2.weight",
)
"""Parameters of which a tensor-parallel rank holds a slice; it holds all of the others."""
FP8_CASTS = 2
"""Bytes per weight of a layer: its FP8 value, and once more in the order that the backward pass reads (Hopper's FP8 products take one order only)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most. activations: kept between forward and backward, with the recomputation that was asked for;
    without_recompute: what they would be without; buffers: logits and other values that live for a moment at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    without_recompute: float
    buffers: float

    @property
    def total(self) -> float:
        """What the rank needs at its peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Stage:
    """One pipeline rank: its layers (of all its chunks) and their norms, all and the most of one layer; parameters it holds; in_flight: forward passes of
    the whole rank that wait at once; in_layers: parameters of its layers."""

    layers: int
    norms: Norms
    most_norms: Norms
    first: bool
    last: bool
    parameters: int
    in_flight: float
    in_layers: int


@functools.lru_cache(maxsize=256)
def _parts(config_json: str, tensor: int) -> tuple[list[int], list[Norms], dict[str, int]]:
    """(parameters of each layer on one tensor-parallel rank, norms of each layer, parameters of everything else by name)."""
    config = ModelConfig.model_validate_json(config_json)
    layers, rest = [0] * config.num_layers, {}
    for name, shape in parameter_shapes(config):
        size = math.prod(shape) // (tensor if any(cut in name for cut in CUT) else 1)
        if name.startswith("decoder.layers."):
            layers[int(name.split(".")[2])] += size
        else:
            rest[name] = size
    return (
        layers,
        [norms_of(plan) for plan in SCHEMES[config.scheme].plan(config.num_layers, config.scheme_options)],
        rest,
    )


def stages(config: ModelConfig, layout: Layout, micro_batches: int) -> list[Stage]:
    """Every pipeline rank of a layout. Raises UserError while a size of the model is unknown."""
    layers, norms, rest = _parts(config.model_dump_json(), layout.tensor)
    counts = layout.pipeline_split or (config.num_layers // layout.pipeline,) * layout.pipeline
    result, start = [], 0
    for rank, count in enumerate(counts):
        first, last, own = rank == 0, rank == layout.pipeline - 1, slice(start, start + count)
        held = sum(layers[own])
        held += sum(size for name, size in rest.items() if first and name.startswith("embedding."))
        held += sum(
            size for name, size in rest.items() if last and name.startswith(("decoder.final", "output_layer"))
        )
        if last and not first and config.tie_embeddings:
            held += rest["embedding.word_embeddings.weight"]
        result.append(
            Stage(
                count,
                sum(norms[own], Norms()),
                max(norms[own], key=lambda one: one.total),
                first,
                last,
                held,
                _in_flight(layout, rank, micro_batches),
                sum(layers[own]),
            )
        )
        start += count
    return result


def _in_flight(layout: Layout, rank: int, micro_batches: int) -> float:
    """Micro-batches whose activations a pipeline rank holds: 1F1B keeps one per stage behind it; interleaving fills the pipeline with chunks
    (Narayanan et al. 2021, section 2.2: the warm-up of rank r runs 2 (p - r - 1) + (v - 1) p chunks, and one more is under way)."""
    p, v = layout.pipeline, layout.virtual
    if v == 1:
        return min(p - rank, micro_batches)
    return min((2 * (p - rank - 1) + (v - 1) * p + 1) / v, micro_batches)


def rank_memory(stage: Stage, layout: Layout, activations: Activations, *, fp8: bool = False) -> Memory:
    """Memory of one pipeline rank.

    Weights in the format of the activations; fp32 gradients, whole on every rank; AdamW's moments and, beside bf16 weights or under ZeRO, an fp32 copy of
    the weights, over data-parallel ranks from ZeRO-1 on. With FP8 also the layers' weights cast, as they are and transposed, kept for a step's micro-batches.
    """
    element, p, shards = activations.element, stage.parameters, layout.data if layout.zero else 1
    state = (3 if layout.zero else 2) * FP32 * p / shards
    plain = _kept(stage, Activations(**{**vars(activations), "recompute": "none"}))
    gradients: float = FP32 * p
    if element < FP32:
        gradients += element * _largest(activations.config, layout.tensor)
    weights = element * p / (layout.data if layout.zero == 3 else 1) + (
        FP8_CASTS * stage.in_layers if fp8 else 0
    )
    return Memory(weights, gradients, state, _kept(stage, activations), plain, _buffers(stage, activations))


def _kept(stage: Stage, activations: Activations) -> float:
    inside = activations.layers(stage.layers, stage.norms) + (activations.embedding() if stage.first else 0)
    return stage.in_flight * inside + (activations.head() if stage.last else 0)


def _buffers(stage: Stage, a: Activations) -> float:
    """The larger of what the loss and what one layer's backward pass hold for a moment beside the saved values (derived).

    Loss: the logits and, in lower precision, their fp32 copy (`model/families/losses.py`); under tensor parallelism its gradient twice in fp32. Layer: the gradients of
    the two widest activations and of the stream on both sides of a join.
    """
    each = 2 * FP32 if a.tensor > 1 else a.element + (FP32 if a.element < FP32 else 0)
    loss = each * a.tokens * a.config.padded_vocab / a.tensor if stage.last else 0.0
    width = a.config.ffn_size * (2 if a.config.gated else 1) / a.tensor
    return max(loss, a.working(stage.most_norms) + 2 * a.tokens * width * a.element + 2 * a.stream)


def _largest(config: ModelConfig, tensor: int) -> float:
    return (
        max(
            config.padded_vocab * config.hidden_size,
            config.hidden_size * config.ffn_size * (2 if config.gated else 1),
        )
        / tensor
    )


def peak_memory(
    config: ModelConfig, layout: Layout, activations: Activations, micro_batches: int, *, fp8: bool = False
) -> Memory:
    """Memory of the pipeline rank that needs most."""
    return max(
        (rank_memory(stage, layout, activations, fp8=fp8) for stage in stages(config, layout, micro_batches)),
        key=lambda memory: memory.total,
    )
