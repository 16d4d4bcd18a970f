"""Memory of one rank by part, as the engine lays it out: weights, gradients, optimizer state,
activations, buffers.

All in bytes.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.cost.activations import FP32, Activations
from model.cost.held import Chunk, Norms, Part, chunk_of, norms_of
from model.depth.placed import PlacedLayer
from model.loss_kernels import LOSS_KERNELS
from model.parameters.table import WORD_EMBEDDING, parameter_table
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

    chunks: tuple[Chunk, ...]
    """Its layers."""
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

    @property
    def parts(self) -> tuple[Part, ...]:
        """Layers of one stack each, of all chunks."""
        return tuple(itertools.chain.from_iterable(self.chunks))


@dataclass(frozen=True)
class _Held:
    """Parameters that one tensor-parallel rank holds of each part of a model."""

    layers: tuple[int, ...]
    before: int
    """The embedding, before the layers."""
    after: int
    """The norm after the layers, and an output projection of its own."""
    words: int
    """The table of words, which the last stage holds too where it is the output projection.

    Not an encoder's own under a decoder.
    """
    hidden: tuple[int, ...]
    """Matrices between the embedding and the output projection: of each layer, and after them."""
    products: tuple[float, ...]
    """Operations of a step's update on them, likewise."""


@functools.lru_cache(maxsize=256)
def _held(config_json: str, tensor: int, optimizer: OptimizerName) -> _Held:
    config = ModelConfig.model_validate_json(config_json)
    count = config.total_layers
    layers, before, after, words = [0] * count, 0, 0, 0
    hidden, products = [0] * (count + 1), [0.0] * (count + 1)
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
        if row.name == WORD_EMBEDDING:
            words += size
    return _Held(tuple(layers), before, after, words, tuple(hidden), tuple(products))


def _held_by(layout: Layout, layers: int) -> list[list[range]]:
    """Numbers of the layers of every chunk of every pipeline rank."""
    if layout.pipeline_split:
        ends = [0, *itertools.accumulate(layout.pipeline_split)]
        return [[range(start, end)] for start, end in itertools.pairwise(ends)]
    p, v = layout.pipeline, layout.virtual
    count = layers // (p * v)
    starts = ([(chunk * p + rank) * count for chunk in range(v)] for rank in range(p))
    return [[range(start, start + count) for start in own] for own in starts]


@functools.lru_cache(maxsize=1024)
def _chunk(config_json: str, first: int, end: int) -> Chunk:
    """Of layers by their numbers. Many layouts have the same ones."""
    places, norms = _normed(config_json)
    return chunk_of(places[first:end], norms[first:end])


@functools.lru_cache(maxsize=16)
def _normed(config_json: str) -> tuple[tuple[PlacedLayer, ...], list[Norms]]:
    places = ModelConfig.model_validate_json(config_json).placed_layers()
    return places, [norms_of(place.plan, cross=place.stack.cross) for place in places]


def stages(
    config: ModelConfig, layout: Layout, micro_batches: int, optimizer: OptimizerName = "adamw"
) -> list[Stage]:
    """Every pipeline rank of a layout. Raises UserError while a size of the model is unknown."""
    written = config.model_dump_json()
    model = _held(written, layout.tensor, optimizer)
    result = []
    for rank, chunks in enumerate(_held_by(layout, len(model.layers))):
        first, last = rank == 0, rank == layout.pipeline - 1
        own = [slice(chunk.start, chunk.stop) for chunk in chunks]
        in_layers = sum(sum(model.layers[chunk]) for chunk in own)
        held = in_layers + (model.before if first else 0) + (model.after if last else 0)
        if last and not first and config.tie_embeddings:
            held += model.words
        matrices, products = (
            sum(sum(of[chunk]) for chunk in own) + (of[-1] if last else 0)
            for of in (model.hidden, model.products)
        )
        result.append(
            Stage(
                tuple(_chunk(written, chunk.start, chunk.stop) for chunk in chunks),
                first,
                last,
                held,
                _in_flight(layout, rank, micro_batches),
                in_layers,
                int(matrices),
                products,
            )
        )
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
    moments and, beside bf16 weights or under ZeRO, an fp32 copy of the weights, over data- and
    context-parallel ranks from ZeRO-1 on.
    With FP8 also the layers' weights cast, as they are and transposed, kept for a step's
    micro-batches.
    """
    element, p, shards = activations.element, stage.parameters, layout.replicas if layout.zero else 1
    kept, hidden = OPTIMIZERS[optimizer], stage.hidden
    moments = len(kept.hidden.states) * hidden + len(kept.others.states) * (p - hidden)
    state = FP32 * (moments + (p if layout.zero else 0)) / shards
    plain = _kept(stage, replace(activations, recompute="none"))
    gradients: float = FP32 * p
    if element < FP32:
        gradients += element * _largest(activations.config, layout.tensor)
    weights = element * p / (layout.replicas if layout.zero == 3 else 1) + (
        FP8_CASTS * stage.in_layers if fp8 else 0
    )
    return Memory(weights, gradients, state, _kept(stage, activations), plain, _buffers(stage, activations))


def _kept(stage: Stage, activations: Activations) -> float:
    inside = sum(map(activations.chunk, stage.chunks)) + (activations.embedding() if stage.first else 0)
    return stage.in_flight * inside + (activations.head() if stage.last else 0)


def _buffers(stage: Stage, a: Activations) -> float:
    """The larger of what the loss and what one layer's backward pass hold for a moment beside the
    saved values (derived).

    Loss: the logits and, in lower precision, their fp32 copy (`model/network/losses.py`); under
    tensor parallelism its gradient twice in fp32.
    Layer: the gradients of the two widest activations and of the stream on both sides of a join.
    """
    layer = max(_layer_buffers(part, a.of(part.stack)) for part in stage.parts)
    return max(_loss_buffers(a) if stage.last else 0.0, layer)


def _loss_buffers(a: Activations) -> float:
    kernel, vocab = LOSS_KERNELS[a.loss_kernel], a.config.padded_vocab / a.tensor
    table = vocab * a.config.hidden_size
    if kernel.fused:
        # The projection's gradient as it is summed, rounded, and with rows of padding.
        sums = FP32 if kernel.widens_gradient and a.element < FP32 else 0
        padded = a.element if a.config.vocab_size != a.config.padded_vocab else 0
        return kernel.copies * a.element * a.logit_rows * vocab + (sums + a.element + padded) * table
    each = 2 * FP32 if a.tensor > 1 else a.element + (FP32 if a.element < FP32 else 0)
    logits = each * a.logit_rows * vocab
    if a.loss_chunk is None:
        return logits
    # The chunk's own, and its gradient of the projection beside the sum of those before it.
    return logits + a.logits_kept() + a.element * table


def _layer_buffers(part: Part, a: Activations) -> float:
    """a: as the layer's stack sees it."""
    width = a.config.ffn_size * (2 if a.config.gated else 1) / a.tensor
    return a.working(part.most_norms) + 2 * a.tokens * width * a.element + 2 * a.stream


def _largest(config: ModelConfig, tensor: int) -> float:
    width = max(config.of(stack).ffn_size for stack in config.blueprint.stacks)
    wide = config.hidden_size * width * (2 if config.gated else 1)
    return max(config.padded_vocab * config.hidden_size, wide) / tensor


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
