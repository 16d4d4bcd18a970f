"""Time of a step by a roofline: every kind of work at a stated share of what the hardware can do.

Where a layer is too small to hide the host's time for its launches, that counts.
All constants of the model stand in this file and in `parallel/hardware/gpus.py`;
docs/performance.md holds the result against published runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from model.cost.activations import FP32, Activations
from model.cost.flops import forward_flops, stack_flops
from model.families.family import Stack
from model.loss_kernels import LOSS_KERNELS
from parallel.engine.overlap import PIECES
from parallel.hardware.gpus import Gpu
from parallel.optimizers import OPTIMIZERS, Optimizer, OptimizerName
from parallel.topology import Layout
from pretrain.plan.counted import LayerCost, Way, layer_cost
from pretrain.plan.memory import Stage, stages

HOST_GPUS = 8
"""GPUs that share NVLink; groups that reach beyond use the network."""
TRAFFIC = 0.5
"""Reached share of the memory bandwidth in element-wise work (fitted)."""
WIRE = 0.7
"""Reached share of NVLink's and the network's bandwidth in large collectives."""
LAUNCH_S = 8e-6
"""Host time of one operator under PyTorch's eager execution, with its share of Python and of views
(derived from a profile of this code: a third of a millisecond a layer, whose 41 operators
`counted.py` beside this file counts).
"""
BACKWARD = 2 / 3
"""Share of a micro-batch's time that is its backward pass, behind which gradients are reduced."""
ATTENTION_BACKWARD = 2.5
"""Products of fused attention's backward pass per forward product: it computes the scores again."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank."""

    compute: float
    """Of all micro-batches without waiting."""
    bubble: float
    """Idle pipeline."""
    communication: float
    """What does not run beside the computation."""
    optimizer: float
    """Clipping and the update."""
    host: float
    """How much of `compute` is waiting for launches."""
    products: float
    """How much of `compute` are products with weights."""
    attention: float
    """How much of `compute` is attention's core."""
    tensor: float
    """How much of `compute` is sent between tensor- and context-parallel ranks."""

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.bubble + self.communication + self.optimizer

    def shares(self) -> dict[str, float]:
        """What the step is spent on, in words of `LIMITS`, the largest share first."""
        inside = self.products + self.attention + self.host + self.tensor
        parts = {
            "products": self.products,
            "attention": self.attention,
            "bytes": self.compute - inside + self.optimizer,
            "launches": self.host,
            "reduction": self.communication + self.tensor,
            "bubble": self.bubble,
        }
        return {word: parts[word] / self.total for word in sorted(parts, key=lambda word: -parts[word])}


LIMITS = {
    "products": "products with weights",
    "attention": "attention between tokens, whose products reach a smaller share of the peak",
    "bytes": "memory traffic of element-wise work, loss, sums of gradients and optimizer",
    "launches": "the host, which starts operators that are too small to hide it",
    "reduction": "gradients and other values that are sent and not hidden",
    "bubble": "pipeline stages that wait",
}
"""What a step can be spent on."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by kind of parallelism."""

    tensor: float
    pipeline: float
    data: float
    context: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensor + self.pipeline + self.data + self.context


@dataclass(frozen=True)
class Seconds:
    """Time of one micro-batch, forward, backward and recomputation."""

    products: float
    attention: float
    moved: float
    """Of memory traffic."""
    host: float = 0.0

    @property
    def device(self) -> float:
        """How long the device is busy."""
        return self.products + self.attention + self.moved

    @property
    def waiting(self) -> float:
        """How long the device waits for the host."""
        return max(0.0, self.host - self.device)


class FusedProducts(NamedTuple):
    """What products add onto by themselves."""

    sums: bool = False
    """`train.gradient_accumulation_fusion`."""
    residual: bool = False
    """`train.residual_in_product`."""
    activation: bool = False
    """`train.activation_in_product`."""


APART = FusedProducts()
"""Nothing."""


def layer_seconds(gpu: Gpu, a: Activations, precision: str, stack: Stack, cost: LayerCost) -> Seconds:
    """Time of one layer of a stack. a: as this stack sees it.

    Under masks of any form, as encoder-decoders have them, attention computes the full square.
    """
    c, tokens = a.config, a.tokens / a.tensor
    causal = stack.causal and not c.blueprint.crossed
    projections, scores, mlp = stack_flops(c, a.seq_length, a.source_length, causal=causal)
    again = 1.0 if a.recompute == "full" else 0.0
    share = gpu.fp8 if precision == "fp8" else gpu.matmul
    linear = (projections + mlp) / c.num_layers * tokens * (3 + again) / (gpu.peak(precision) * share)
    passes = 1 + ATTENTION_BACKWARD + (1.0 if a.recompute != "none" else 0.0)
    dense = "bf16" if precision == "fp8" else precision
    core = scores / c.num_layers * tokens * passes / (gpu.peak(dense) * gpu.attention)
    moved = cost.moved(a.samples, a.tensor, sequence_parallel=a.sequence_parallel, passes=1 + again)
    return Seconds(linear, core, moved / (gpu.bandwidth * TRAFFIC), cost.operators(1 + again) * LAUNCH_S)


def layer_costs(a: Activations, fused: FusedProducts = APART) -> dict[str, LayerCost]:
    """What the layers of every stack cost beside products and attention, by the stack's name."""
    way = Way(
        a.seq_length // a.context,
        a.source_length,
        samples=2,  # of one alone, copies between layouts are views
        element=a.element,
        fp32_stream=a.fp32_stream,
        selective=a.recompute == "selective",
        documents=a.documents,
        joined=a.joined,
        alone=a.joined and a.recompute == "full",
        fused_sums=fused.sums,
        fused_residual=fused.residual,
        fused_activation=fused.activation,
    )
    return {stack.name: layer_cost(a.config, stack, way) for stack in a.config.blueprint.stacks}


def head_seconds(gpu: Gpu, a: Activations, precision: str) -> Seconds:
    """Time of the vocabulary projection and the loss; logits are moved about seven times in fp32
    (derived). In chunks they are made twice, by fused kernels too (`model/loss_kernels.py`).
    """
    dense, kernel = "bf16" if precision == "fp8" else precision, LOSS_KERNELS[a.loss_kernel]
    passes = 4 if a.logits_again else 3
    flops = passes * forward_flops(a.config, a.seq_length, a.targets, a.source_length).vocabulary
    products = flops * a.tokens / a.tensor / (gpu.peak(dense) * gpu.matmul)
    bytes_each = (9 if a.logits_again else 7) * FP32
    if kernel.fused:
        bytes_each = kernel.moves * a.element
    moved = bytes_each * a.labels * a.config.padded_vocab / a.tensor / (gpu.bandwidth * TRAFFIC)
    return Seconds(products, 0.0, moved)


def traffic(layout: Layout, stage: Stage, a: Activations, micro_batches: int) -> Traffic:
    """Bytes sent per step.

    Tensor: an all-reduce, or gather and scatter, after each of a layer's branches, forward and
    backward, of 2 (t-1)/t streams; for what cross-attention reads once in both passes together.
    Pipeline: one message per chunk boundary each way.
    Data: fp32 gradients reduced (all-reduced at ZeRO-0), updated weights gathered, over the ranks
    that hold the same parameters.
    Context: keys and values of a layer gathered, again where attention is computed again, and their
    gradients scattered.
    """
    t, d, n = layout.tensor, layout.replicas, layout.context
    again = 1 if a.recompute == "full" else 0
    width, tensor = a.config.hidden_size * a.element, 0.0
    for part in stage.parts:
        side = a.of(part.stack)
        passed: float = side.sublayers * (2 + again) * side.tokens
        if side.source_length is not None:
            # Gathered forward and scattered backward, or summed backward.
            passed += (1 + (again / 2 if a.sequence_parallel else 0)) * side.samples * side.source_length
        tensor += micro_batches * part.count * passed * 2 * (t - 1) / t * width
    keys = 2 * a.samples * a.seq_length * a.config.groups * a.config.kv_channels * a.element / t
    exchanges = 2 if a.recompute == "none" else 3
    layers = sum(part.count for part in stage.parts)
    context = micro_batches * layers * exchanges * keys * (n - 1) / n
    pipeline = micro_batches * layout.virtual * 2 * a.message if layout.pipeline > 1 else 0.0
    ring = (d - 1) / d
    data = stage.parameters * ring * (FP32 + a.element if layout.zero else 2 * FP32)
    return Traffic(tensor, pipeline, data, context)


def step_time(
    gpu: Gpu,
    layout: Layout,
    a: Activations,
    micro_batches: int,
    precision: str,
    *,
    overlap: bool = False,
    graph: bool = False,
    early: bool = False,
    narrow: bool = False,
    optimizer: OptimizerName = "adamw",
    fused: FusedProducts = APART,
) -> StepTime:
    """The step of a layout.

    overlap: data- and pipeline-parallel communication runs beside the computation, as in the
    published runs; here most does not.
    graph: the host launches a step at once.
    early: gradients are reduced during the last backward pass.
    narrow: they are sent in bf16.
    optimizer: whose update ends the step.
    """
    costs = layer_costs(a, fused)
    kinds = {
        stack.name: layer_seconds(gpu, a.of(stack), precision, stack, costs[stack.name])
        for stack in a.config.blueprint.stacks
    }
    added = next(iter(costs.values())).accumulated
    if graph:
        kinds = {name: replace(layer, host=0.0) for name, layer in kinds.items()}
    head = head_seconds(gpu, a, precision)
    everything = stages(a.config, layout, micro_batches, optimizer)
    slowest, heaviest = 0.0, everything[0]
    for stage in everything:
        seconds = _over(stage, kinds, lambda layer: layer.device + layer.waiting)
        seconds += head.device if stage.last else 0.0
        seconds += _inside_seconds(gpu, layout, stage, a)
        seconds += stage.parameters * added / (gpu.bandwidth * TRAFFIC)
        if seconds > slowest:
            slowest, heaviest = seconds, stage
    sent = traffic(layout, heaviest, a, micro_batches)
    pipeline = sent.pipeline / _wire(gpu, layout.tensor * layout.context * layout.pipeline)
    data = sent.data / _wire(gpu, layout.world)
    if narrow:
        data *= (FP32 / 2 + a.element) / (FP32 + a.element)
    compute = micro_batches * slowest
    if early:
        reduced = data * (FP32 / (FP32 + a.element) if layout.zero else 1.0)
        data -= min(reduced * (1 - 1 / PIECES), BACKWARD * slowest)
    return StepTime(
        compute=compute,
        bubble=(layout.pipeline - 1) / layout.virtual * slowest,
        communication=max(0.0, pipeline + data - compute) if overlap else pipeline + data,
        optimizer=_optimizer(gpu, heaviest, layout, a, OPTIMIZERS[optimizer]),
        host=micro_batches * _over(heaviest, kinds, lambda layer: layer.waiting),
        products=micro_batches
        * (_over(heaviest, kinds, lambda layer: layer.products) + (head.products if heaviest.last else 0.0)),
        attention=micro_batches * _over(heaviest, kinds, lambda layer: layer.attention),
        tensor=micro_batches * _inside_seconds(gpu, layout, heaviest, a),
    )


def _over(stage: Stage, kinds: Mapping[str, Seconds], what: Callable[[Seconds], float]) -> float:
    """The sum over a stage's layers. kinds: time of one layer by the name of its stack."""
    return sum(part.count * what(kinds[part.stack.name]) for part in stage.parts)


def _inside_seconds(gpu: Gpu, layout: Layout, stage: Stage, a: Activations) -> float:
    """What tensor- and context-parallel ranks send each other in a micro-batch."""
    sent, ranks = traffic(layout, stage, a, 1), layout.tensor * layout.context
    return sent.tensor / _wire(gpu, layout.tensor) + sent.context / _wire(gpu, ranks)


def _wire(gpu: Gpu, ranks: int) -> float:
    return WIRE * (gpu.link if ranks <= HOST_GPUS else gpu.network)


def _optimizer(gpu: Gpu, stage: Stage, layout: Layout, a: Activations, optimizer: Optimizer) -> float:
    """Zeroing the sums, the norm, clipping, the update of this rank's share and the copy into the
    weights; for updates of whole matrices also their products, and gathering them before.
    """
    shards = layout.replicas if layout.zero else 1
    others, hidden = stage.parameters - stage.hidden, stage.hidden
    values = 3 * stage.parameters + optimizer.others.moved * others + optimizer.hidden.moved * hidden
    moved = stage.parameters * FP32 + (values * FP32 + stage.parameters * a.element) / shards
    seconds = moved / (gpu.bandwidth * TRAFFIC)
    if not optimizer.hidden.whole:
        return seconds
    # Data-parallel ranks share the matrices, tensor-parallel ones compute the same.
    d, t = layout.replicas, layout.tensor
    precision = "fp32" if a.element == FP32 else "bf16"
    seconds += stage.products / shards / (gpu.peak(precision) * gpu.matmul)
    seconds += hidden * a.element * (d - 1) / d / _wire(gpu, layout.world)
    return seconds + hidden * a.element * (t - 1) / shards / _wire(gpu, t)


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """Idle share of the pipelined time: (p - 1) / (v m + p - 1) (Narayanan et al. 2021, section
    2.2).
    """
    return (layout.pipeline - 1) / (layout.virtual * micro_batches + layout.pipeline - 1)
