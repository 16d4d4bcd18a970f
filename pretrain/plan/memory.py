"""Memory of one rank by part, as the engine lays it out: weights, gradients, optimizer state,
activations, buffers.

All in bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from model.config import ModelConfig
from model.cost.activations import FP32, Activations, Norms, norms_of
from model.parameters.table import Role, parameter_table
from parallel.optimizers import OPTIMIZERS, OptimizerName
from parallel.topology import Layout

FP8_CASTS = 2
"""Bytes per weight of a layer: its FP8 value, and once more in the order that the backward pass
reads (Hopper's FP8 products take one order only).
"""


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept between forward and backward, with the recomputation that was asked for."""
    without_recompute: float
    """What they would be without."""
    buffers: float
    """Logits and other values that live for a moment at the peak."""

    @property
    def total(self) -> float:
        """What the rank needs at its peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Stage:
    """One pipeline rank."""

    layers: int
    """Of all its chunks."""
    norms: Norms
    """In all its layers."""
    most_norms: Norms
    """In one layer."""
    first: bool
    last: bool
    parameters: int
    in_flight: float
    """Forward passes of the whole rank that wait at once."""
    in_layers: int
    """Parameters of its layers."""
    hidden: int
    """Parameters that are matrices between the embedding and the output projection."""
    products: float
    """Operations of a step's update on those matrices, which are whole for it."""


@dataclass(frozen=True)
class _Held:
    """Parameters that one tensor-parallel rank holds of each part of a model."""

    layers: tuple[int, ...]
    norms: tuple[Norms, ...]
    """Of each layer, a count of modules."""
    before: int
    """The embedding, before the layers."""
    after: int
    """The norm after the layers, and an output projection of its own."""
    words: int
    """The table of words, which the last stage holds too where it is the output projection."""
    hidden: tuple[int, ...]
    """Matrices between the embedding and the output projection: of each layer, and after them."""
    products: tuple[float, ...]
    """Operations of a step's update on them, likewise."""


@functools.lru_cache(maxsize=256)
def _held(config_json: str, tensor: int, optimizer: OptimizerName) -> _Held:
    config = ModelConfig.model_validate_json(config_json)
    layers, before, after, words = [0] * config.num_layers, 0, 0, 0
    hidden, products = [0] * (config.num_layers + 1), [0.0] * (config.num_layers + 1)
    operations = OPTIMIZERS[optimizer].hidden.products
    for row in parameter_table(config):
        size = row.elements // (1 if row.cut is None else tensor)
        if row.hidden:
            at = -1 if row.layer is None else row.layer
            hidden[at] += size
            products[at] += sum(operations(*shape) for shape in row.matrices) if operations else 0
        if row.layer is not None:
            layers[row.layer] += size
        elif row.stack == "embedding":
            before += size
        else:
            after += size
        if row.role is Role.WORD:
            words += size
    norms = tuple(norms_of(plan) for plan in config.depth_plan().layers)
    return _Held(tuple(layers), norms, before, after, words, tuple(hidden), tuple(products))


def stages(
    config: ModelConfig, layout: Layout, micro_batches: int, optimizer: OptimizerName = "adamw"
) -> list[Stage]:
    """Every pipeline rank of a layout. Raises UserError while a size of the model is unknown."""
    model = _held(config.model_dump_json(), layout.tensor, optimizer)
    counts = layout.pipeline_split or (config.num_layers // layout.pipeline,) * layout.pipeline
    result, start = [], 0
    for rank, count in enumerate(counts):
        first, last, own = rank == 0, rank == layout.pipeline - 1, slice(start, start + count)
        in_layers, norms = sum(model.layers[own]), model.norms[own]
        held = in_layers + (model.before if first else 0) + (model.after if last else 0)
        if last and not first and config.tie_embeddings:
            held += model.words
        matrices, products = (sum(of[own]) + (of[-1] if last else 0) for of in (model.hidden, model.products))
        result.append(
            Stage(
                count,
                sum(norms, Norms()),
                max(norms, key=lambda one: one.total),
                first,
                last,
                held,
                _in_flight(layout, rank, micro_batches),
                in_layers,
                int(matrices),
                products,
            )
        )
        start += count
    return result


def _in_flight(layout: Layout, rank: int, micro_batches: int) -> float:
    """Micro-batches whose activations a pipeline rank holds: 1F1B keeps one per stage behind it;
    interleaving fills the pipeline with chunks
    (Narayanan et al. 2021, section 2.2: the warm-up of rank r runs 2 (p - r - 1) + (v - 1) p
    chunks, and one more is under way).
    """
    p, v = layout.pipeline, layout.virtual
    if v == 1:
        return min(p - rank, micro_batches)
    return min((2 * (p - rank - 1) + (v - 1) * p + 1) / v, micro_batches)


def rank_memory(
    stage: Stage,
    layout: Layout,
    activations: Activations,
    *,
    fp8: bool = False,
    optimizer: OptimizerName = "adamw",
) -> Memory:
    """Memory of one pipeline rank.

    Weights in the format of the activations; fp32 gradients, whole on every rank; the optimizer's
    moments and, beside bf16 weights or under ZeRO, an fp32 copy of the weights, over data-parallel
    ranks from ZeRO-1 on.
    With FP8 also the layers' weights cast, as they are and transposed, kept for a step's
    micro-batches.
    """
    element, p, shards = activations.element, stage.parameters, layout.data if layout.zero else 1
    kept, hidden = OPTIMIZERS[optimizer], stage.hidden
    moments = len(kept.hidden.states) * hidden + len(kept.others.states) * (p - hidden)
    state = FP32 * (moments + (p if layout.zero else 0)) / shards
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
    """The larger of what the loss and what one layer's backward pass hold for a moment beside the
    saved values (derived).

    Loss: the logits and, in lower precision, their fp32 copy (`model/network/losses.py`); under
    tensor parallelism its gradient twice in fp32.
    Layer: the gradients of the two widest activations and of the stream on both sides of a join.
    """
    each = 2 * FP32 if a.tensor > 1 else a.element + (FP32 if a.element < FP32 else 0)
    loss = each * a.labels * a.config.padded_vocab / a.tensor if stage.last else 0.0
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
    config: ModelConfig,
    layout: Layout,
    activations: Activations,
    micro_batches: int,
    *,
    fp8: bool = False,
    optimizer: OptimizerName = "adamw",
) -> Memory:
    """Memory of the pipeline rank that needs most."""
    return max(
        (
            rank_memory(stage, layout, activations, fp8=fp8, optimizer=optimizer)
            for stage in stages(config, layout, micro_batches, optimizer)
        ),
        key=lambda memory: memory.total,
    )
