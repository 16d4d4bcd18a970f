"""What a run will need and how long it will take, before it starts: one prediction per layout.

And the layouts that fit, best first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from model.config import ModelConfig
from model.cost.activations import Activations
from model.cost.flops import FlopCount, Recompute, flops_per_token
from model.errors import UserError
from model.loss_kernels import LossKernelName
from parallel.config import ParallelConfig, RecomputeConfig
from parallel.hardware.gpus import GIB, Gpu
from parallel.optimizers import OptimizerName
from parallel.topology import Layout, check_layout
from pretrain.config.conflicts import check_graph, check_whole_projection
from pretrain.config.schema import RunConfig
from pretrain.plan.memory import Memory, peak_memory, stages
from pretrain.plan.speed import (
    APART,
    FusedProducts,
    StepTime,
    Traffic,
    bubble_share,
    step_time,
    traffic,
)

RESERVED = 3 * GIB
"""Memory that no tensor may have: CUDA context, NCCL and kernel workspaces, fragments."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
VIRTUAL = (1, 2, 4, 8)
MOST_TENSOR = 8
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Work:
    """What has to be done, whatever the layout."""

    config: ModelConfig
    seq_length: int
    batch: int
    """Samples of a step over all GPUs."""
    precision: str
    """Of matrix products: bf16, fp32 or fp8."""
    graph: bool = False
    """`train.cuda_graph`."""
    fp32_stream: bool = False
    """`train.fp32_residual`."""
    targets: float = 1.0
    """Share of the positions that have labels."""
    optimizer: OptimizerName = "adamw"
    """`optimizer.kind`."""
    source_length: int | None = None
    """Tokens of a sample that an encoder under the decoder reads; None without one."""
    loss_chunk: int | None = None
    """`train.loss_chunk`."""
    documents: bool = False
    """Documents of a sample do not see each other."""
    loss_kernel: LossKernelName = "local"
    """`train.loss_kernel`."""
    joined: bool = False
    """`train.kernels` is local_joined."""
    fused: FusedProducts = APART

    def flops(self, recompute: Recompute = "none") -> FlopCount:
        """Operations per token; what an encoder costs counts as that of the decoder's tokens."""
        return flops_per_token(
            self.config,
            self.seq_length,
            recompute=recompute,
            targets=self.targets,
            source_length=self.source_length,
        )

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return 4 if self.precision == "fp32" else 2

    def activations(self, parallel: ParallelConfig, layout: Layout, micro: int) -> Activations:
        """What a rank of this layout keeps of a micro-batch of `micro` samples."""
        return Activations(
            self.config,
            micro,
            self.seq_length,
            self.element,
            layout.tensor,
            layout.sequence_parallel,
            parallel.recompute.granularity,
            parallel.recompute.num_layers,
            fused=True,
            fp32_stream=self.fp32_stream,
            targets=self.targets,
            source_length=self.source_length,
            loss_chunk=self.loss_chunk,
            loss_kernel=self.loss_kernel,
            context=layout.context,
            documents=self.documents,
            joined=self.joined,
        )


@dataclass(frozen=True)
class Prediction:
    """One layout."""

    parallel: ParallelConfig
    """What gives it."""
    layout: Layout
    micro: int
    """Samples of a micro-batch."""
    micro_batches: int
    """Per step and rank."""
    memory: Memory
    time: StepTime
    traffic: Traffic
    bubble: float
    tokens_per_s: float
    mfu: float
    """Model FLOPs over the peak of all GPUs, causal attention counted as half."""
    fits: bool

    def summary(self) -> dict[str, int | str]:
        """Degrees and choices by their usual abbreviations."""
        return {
            **self.layout.summary(),
            "sp": int(self.layout.sequence_parallel),
            "micro": self.micro,
            "recompute": self.parallel.recompute.granularity,
        }


def work_of(config: RunConfig, model: ModelConfig) -> Work:
    """The work of a run; `auto` precision is bf16, as on every GPU that can be planned for.

    Raises UserError while the vocabulary is unknown.
    """
    if model.vocab_size is None:
        raise UserError(
            "model.vocab_size is not known: set it (model.vocab_size=50257), "
            "or prepare the data, whose tokenizer gives it"
        )
    precision = "fp32" if config.train.precision == "fp32" else "bf16"
    if config.train.fp8.recipe != "none":
        precision = "fp8"
    return Work(
        model,
        config.data.seq_length,
        config.train.global_batch_size,
        precision,
        config.train.cuda_graph,
        config.train.fp32_residual,
        config.target_share,
        config.optimizer.kind,
        config.data.source_length,
        config.train.loss_chunk,
        config.hides_documents,
        config.train.loss_kernel,
        config.train.kernels == "local_joined",
        FusedProducts(
            config.train.gradient_accumulation_fusion,
            config.train.residual_in_product,
            config.train.activation_in_product,
        ),
    )


def _in_graph(work: Work, parallel: ParallelConfig) -> bool:
    """Whether the host launches a step at once.

    The ranked list has layouts that a graph does not combine with.
    """
    try:
        check_graph(work.config, parallel, work.precision if work.precision == "fp8" else "none")
    except ValueError:
        return False
    return work.graph


def _has_losses(work: Work, parallel: ParallelConfig) -> bool:
    """Whether what computes the losses has a form for a layout."""
    try:
        check_whole_projection(work.loss_kernel, parallel)
    except ValueError:
        return False
    return True


def _fused(work: Work, layout: Layout) -> FusedProducts:
    """What products add onto; the ranked list has layouts that this does not combine with."""
    if layout.zero == 3:
        return APART
    if layout.tensor == 1:
        return work.fused
    return work.fused._replace(residual=False, activation=False)


def predict(
    work: Work, gpu: Gpu, parallel: ParallelConfig, world: int, micro: int, *, overlap: bool = False
) -> Prediction:
    """The prediction for one layout over `world` GPUs. overlap: as in `step_time`.

    Raises UserError where the layout is impossible.
    """
    layout = check_layout(parallel, work.config, world)
    count = layout.num_microbatches(work.batch, micro)
    layout.check_batches(work.seq_length, count, work.source_length)
    activations = work.activations(parallel, layout, micro)
    graph = _in_graph(work, parallel)
    time = step_time(
        gpu,
        layout,
        activations,
        count,
        work.precision,
        overlap=overlap,
        graph=graph,
        early=parallel.reduces_early(graph=graph),
        narrow=parallel.grad_reduce == "bf16" and layout.replicas > 1,
        optimizer=work.optimizer,
        fused=_fused(work, layout),
    )
    memory = peak_memory(
        work.config, layout, activations, count, fp8=work.precision == "fp8", optimizer=work.optimizer
    )
    if parallel.offload.optimizer:
        memory = replace(memory, optimizer=0.0)  # it lies in host memory
    rate = work.batch * work.seq_length / time.total
    flops = work.flops().model
    heaviest = max(stages(work.config, layout, count), key=lambda stage: stage.parameters)
    sent = traffic(layout, heaviest, activations, count)
    mfu = rate * flops / (world * gpu.peak(work.precision))
    fits = memory.total + RESERVED <= gpu.memory
    return Prediction(
        parallel,
        layout,
        micro,
        count,
        memory,
        time,
        sent,
        bubble_share(layout, count),
        rate,
        mfu,
        fits,
    )


def layouts(config: ModelConfig, world: int, asked: ParallelConfig) -> Iterator[ParallelConfig]:
    """Layouts worth trying over `world` GPUs, without context parallelism.

    asked: the configured one; those with data-parallel ranks reduce gradients as it does.
    Tensor parallelism within a host and with sequence parallelism, pipelines whose stages have
    about as many sublayers; interleaved ones where all chunks have as many layers.
    """
    layers, crossed = config.total_layers, config.blueprint.crossed
    for tensor in range(1, min(MOST_TENSOR, world) + 1):
        for pipeline in range(1, min(layers, world // tensor) + 1):
            if world % (tensor * pipeline):
                continue
            alone = world == tensor * pipeline
            uneven = pipeline > 1 and (crossed or layers % pipeline > 0)
            for virtual in VIRTUAL if pipeline > 1 and layers % pipeline == 0 else (1,):
                for granularity in RECOMPUTE:
                    yield ParallelConfig(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_stages=virtual,
                        pipeline_split="auto" if uneven and virtual == 1 else None,
                        sequence_parallel=tensor > 1,
                        zero=1,
                        overlap_grad_reduce=None if alone else asked.overlap_grad_reduce,
                        grad_reduce="fp32" if alone else asked.grad_reduce,
                        recompute=RecomputeConfig(granularity=granularity),
                    )


def possible(work: Work, gpu: Gpu, world: int, asked: ParallelConfig) -> list[Prediction]:
    """All layouts worth trying that divide model, batch and GPUs evenly, fitting or not.

    asked: as in `layouts`.
    """
    found = []
    for parallel in filter(partial(_has_losses, work), layouts(work.config, world, asked)):
        for micro in MICRO_BATCHES:
            with contextlib.suppress(UserError):
                found.append(predict(work, gpu, parallel, world, micro))
    return found


def rank(predictions: Sequence[Prediction], *, most: int = 10) -> list[Prediction]:
    """The layouts that fit into the GPU's memory, fastest first, at most `most`.

    Of equals (within 0.1 %) the one that needs less memory.
    """
    found = [one for one in predictions if one.fits]
    found.sort(key=lambda one: (round(one.time.total, 3 - len(str(int(one.time.total)))), one.memory.total))
    return found[:most]


def why_none(work: Work, gpu: Gpu, world: int, predictions: Sequence[Prediction]) -> str:
    """What is wrong where no layout fits, and what to do."""
    if predictions:
        least = min(one.memory.total for one in predictions) + RESERVED
        return (
            f"No layout fits: the smallest needs {least / GIB:.1f} of {gpu.memory / GIB:.1f} GiB. "
            "Take more GPUs, or a smaller model."
        )
    most = work.batch * MOST_TENSOR * work.config.total_layers
    if world > most:
        return (
            f"No layout is possible: {world} GPUs are more than train.global_batch_size={work.batch} "
            f"samples can keep busy, with at most {MOST_TENSOR} tensor-parallel ranks and "
            f"one layer to a pipeline stage ({most} GPUs). Take fewer GPUs, or a larger batch."
        )
    return (
        f"No layout is possible: no tensor x pipeline degrees for this model divide {world} "
        f"GPUs so that the data-parallel ranks divide train.global_batch_size={work.batch}. "
        "Take another number of GPUs, or another batch."
    )


def configured(config: RunConfig, work: Work, gpu: Gpu, world: int) -> Prediction:
    """The layout that the configuration asks for.

    Raises UserError where it does not fit the GPUs.
    """
    return predict(work, gpu, config.parallel, world, config.train.micro_batch_size)


def days(prediction: Prediction, tokens: float) -> float:
    """Days for a number of tokens, without evaluation, checkpoints and standstill."""
    return tokens / prediction.tokens_per_s / 86400
