"""Time of a step by a roofline: every kind of work at a stated share of what the hardware can do, and host time where a layer is too small to hide it.

All constants of the model stand in this file and in `parallel/hardware/accelerators.py`; docs/performance.md holds the result against published runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.cost.activations import FP32, Activations
from model.cost.flops import forward_flops
from parallel.engine.overlap import PIECES
from parallel.hardware.accelerators import Accelerator
from parallel.topology import Layout
from pretrain.plan.memory import Stage, stages

HOST_GPUS = 8
"""GPUs that share NVLink; groups that reach beyond use the network."""
TRAFFIC = 0.45
"""Reached share of the memory bandwidth in element-wise work (fitted: it also stands for operators that move data and are not counted)."""
WIRE = 0.7
"""Reached share of NVLink's and the network's bandwidth in large collectives."""
LAUNCH_S = 5e-6
"""Host time of one operator under PyTorch's eager execution (derived from a profile of this code: about 0.2 ms of host time per layer and pass)."""
LAUNCHES = {"forward": 18, "backward": 36, "accumulate": 12}
"""Operators of one pre-norm layer with biases, counted with torch.profiler; `accumulate` in bf16 only, one per parameter."""
CASTS = {"forward": 2, "backward": 2}
"""Further operators of a layer whose stream is in fp32 and whose branches are not: each branch reads a copy in its own format (derived)."""
SELECTIVE_LAUNCHES = 6
"""Further operators where attention's core is computed again."""
BACKWARD = 2 / 3
"""Share of a micro-batch's time that is its backward pass, behind which gradients are reduced."""
ATTENTION_BACKWARD = 2.5
"""Products of fused attention's backward pass per forward product: it computes the scores again."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest rank. compute: of all micro-batches without waiting; bubble: idle pipeline; communication: what does
    not overlap; host: how much of `compute` is waiting for launches; optimizer: clipping and the update."""

    compute: float
    bubble: float
    communication: float
    optimizer: float
    host: float

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.bubble + self.communication + self.optimizer


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by kind of parallelism."""

    tensor: float
    pipeline: float
    data: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensor + self.pipeline + self.data


def layer_seconds(gpu: Accelerator, a: Activations, precision: str) -> tuple[float, float]:
    """(time on the device, time of the host) of one layer: forward, backward and recomputation of one micro-batch."""
    c, tokens = a.config, a.tokens / a.tensor
    flops = forward_flops(c, a.seq_length)
    again = 1.0 if a.recompute == "full" else 0.0
    share = gpu.fp8 if precision == "fp8" else gpu.matmul
    linear = (
        (flops.attention_linear + flops.mlp)
        / c.num_layers
        * tokens
        * (3 + again)
        / (gpu.peak(precision) * share)
    )
    core_again = 1.0 if a.recompute != "none" else 0.0
    dense = "bf16" if precision == "fp8" else precision
    core = (
        flops.attention_core
        / c.num_layers
        * tokens
        * (1 + ATTENTION_BACKWARD + core_again)
        / (gpu.peak(dense) * gpu.attention)
    )
    elementwise = _moved_bytes(a) * (1 + again / 3) / (gpu.bandwidth * TRAFFIC)
    extra = SELECTIVE_LAUNCHES if a.recompute == "selective" else 0
    casts = 1 if a.fp32_stream else 0
    calls = (
        extra
        + (LAUNCHES["forward"] + casts * CASTS["forward"]) * (1 + again)
        + LAUNCHES["backward"]
        + casts * CASTS["backward"]
        + (LAUNCHES["accumulate"] if a.element < FP32 else 0)
    )
    return linear + core + elementwise, calls * LAUNCH_S


def _moved_bytes(a: Activations) -> float:
    """Bytes that a layer's element-wise operators read and write in forward and backward (derived: a norm moves 2 and 3 streams, a join 3 and 3,
    of which 2 and 2 are the stream itself and not a branch, rotary embedding 4 and 4 times queries and keys, an activation its input and output, backward
    also its gradient; a stream in another format than the branches is read and its copy written)."""
    c, n = a.config, a.tokens * a.element / a.tensor
    stream = a.narrow * 2 * (2 + 3 + 1 + 1) + a.stream * 2 * (2 + 2)
    if a.fp32_stream:
        stream += 2 * 2 * (a.stream + a.narrow)
    wide = (3 + 5) if c.gated else (2 + 3)
    rotary = 8 * (c.num_attention_heads + c.groups) * c.kv_channels if c.position == "rotary" else 0
    return stream + n * (wide * c.ffn_size + rotary)


def head_seconds(gpu: Accelerator, a: Activations, precision: str) -> float:
    """Vocabulary projection and loss of one micro-batch, forward and backward; logits are moved about seven times in fp32 (derived)."""
    dense = "bf16" if precision == "fp8" else precision
    products = (
        3
        * forward_flops(a.config, a.seq_length).vocabulary
        * a.tokens
        / a.tensor
        / (gpu.peak(dense) * gpu.matmul)
    )
    return products + 7 * FP32 * a.tokens * a.config.padded_vocab / a.tensor / (gpu.bandwidth * TRAFFIC)


def traffic(layout: Layout, stage: Stage, a: Activations, micro_batches: int) -> Traffic:
    """Bytes sent per step. Tensor: an all-reduce, or gather and scatter, after each of a layer's two branches, forward and backward, of 2 (t-1)/t streams.
    Pipeline: one stream per chunk boundary each way. Data: fp32 gradients reduced (all-reduced at ZeRO-0), updated weights gathered."""
    t, d = layout.tensor, layout.data
    again = 1 if a.recompute == "full" else 0
    whole = a.tokens * a.config.hidden_size * a.element
    tensor = micro_batches * stage.layers * (4 + 2 * again) * 2 * (t - 1) / t * whole
    pipeline = micro_batches * layout.virtual * 2 * a.stream if layout.pipeline > 1 else 0.0
    ring = (d - 1) / d
    data = stage.parameters * ring * (FP32 + a.element if layout.zero else 2 * FP32)
    return Traffic(tensor, pipeline, data)


def step_time(
    gpu: Accelerator,
    layout: Layout,
    a: Activations,
    micro_batches: int,
    precision: str,
    *,
    overlap: bool = False,
    graph: bool = False,
    early: bool = False,
) -> StepTime:
    """The step of a layout. overlap: data- and pipeline-parallel communication runs beside the computation, as in the published runs; here most does not.
    graph: the host launches a step at once; early: gradients are reduced during the last backward pass."""
    slowest, held = 0.0, 0.0
    device, host = layer_seconds(gpu, a, precision)
    if graph:
        host = 0.0
    everything = stages(a.config, layout, micro_batches)
    heaviest = everything[0]
    for stage in everything:
        sent = traffic(layout, stage, a, 1)
        wires = sent.tensor / (_wire(gpu, layout.tensor))
        seconds = (
            stage.layers * max(device, host)
            + (head_seconds(gpu, a, precision) if stage.last else 0.0)
            + wires
        )
        seconds += _accumulation(gpu, stage, a)
        if seconds > slowest:
            slowest, heaviest, held = seconds, stage, stage.layers * max(0.0, host - device)
    sent = traffic(layout, heaviest, a, micro_batches)
    pipeline = sent.pipeline / _wire(gpu, layout.tensor * layout.pipeline)
    data = sent.data / _wire(gpu, layout.world)
    compute = micro_batches * slowest
    if early:
        reduced = data * (FP32 / (FP32 + a.element) if layout.zero else 1.0)
        data -= min(reduced * (1 - 1 / PIECES), BACKWARD * slowest)
    late = max(0.0, pipeline + data - compute) if overlap else pipeline + data
    bubble = (layout.pipeline - 1) / layout.virtual * slowest
    return StepTime(compute, bubble, late, _optimizer(gpu, heaviest, layout, a), micro_batches * held)


def _wire(gpu: Accelerator, ranks: int) -> float:
    return WIRE * (gpu.link if ranks <= HOST_GPUS else gpu.network)


def _accumulation(gpu: Accelerator, stage: Stage, a: Activations) -> float:
    """Reading and writing a micro-batch's weights and gradients: the sum in fp32 is read and written, in bf16 the gradient itself too."""
    return (
        stage.parameters * (2 * FP32 + (2 * a.element if a.element < FP32 else 0)) / (gpu.bandwidth * TRAFFIC)
    )


def _optimizer(gpu: Accelerator, stage: Stage, layout: Layout, a: Activations) -> float:
    """Zeroing the sums, the norm, clipping, AdamW on this rank's share (four fp32 values read, three written) and the copy into the weights."""
    share = stage.parameters / (layout.data if layout.zero else 1)
    moved = stage.parameters * FP32 + share * (3 * FP32 + 7 * FP32 + a.element)
    return moved / (gpu.bandwidth * TRAFFIC)


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """Idle share of the pipelined time: (p - 1) / (v m + p - 1) (Narayanan et al. 2021, section 2.2)."""
    return (layout.pipeline - 1) / (layout.virtual * micro_batches + layout.pipeline - 1)
