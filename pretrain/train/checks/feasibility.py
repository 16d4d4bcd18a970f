"""Whether a run fits its processes and the machine at hand.

Asked before local processes start or a job is submitted, and again by each process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.errors import UserError
from model.loss_kernels import LOSS_KERNELS
from parallel.hardware.fused_losses import check_loss_kernel
from parallel.hardware.precision import Machine, Numerics, check_sizes, numerics_for, this_machine
from parallel.hardware.versions import installed
from parallel.topology import BATCH_KEY, Layout, check_layout
from pretrain.config.load import complete_model
from pretrain.config.schema import RunConfig

if TYPE_CHECKING:
    from pretrain.data.blend import Blend

MOST_PASSES = 1000
"""Of a step over a data set. A batch that repeats its samples more often is a slip of the pen."""


def fit_processes(config: RunConfig, world: int | None) -> Layout:
    """The layout of a run over `world` processes.

    world: None as in `check_layout`.
    Raises UserError where degrees, batch sizes or the sequence length do not come out even.
    """
    train, seq_length, source = config.train, config.data.seq_length, config.data.source_length
    layout = check_layout(config.parallel, complete_model(config), world)
    ramp, warmup, batch = config.schedule.batch_rampup, config.schedule.seq_length_warmup, BATCH_KEY
    # A batch that grows is a sum of these, and a length that grows a multiple.
    for key, size in (
        ("schedule.batch_rampup.increment", ramp.increment),
        ("schedule.batch_rampup.start", ramp.start),
        (batch, train.global_batch_size),
    ):
        if size is not None:
            count = layout.num_microbatches(size, train.micro_batch_size, key)
            layout.check_batches(seq_length, count, source, batch_key=key)
    if warmup.start is not None:
        layout.check_batches(warmup.start, count, length_key="schedule.seq_length_warmup.start")
    if train.eval_samples:
        rounds = eval_rounds(layout, train.eval_samples, train.micro_batch_size)
        layout.check_batches(seq_length, rounds, source)
    return layout


def fit_configuration(config: RunConfig) -> Layout:
    """The layout of a run over as few processes as it takes, on whatever machine.

    config: with the vocabulary of its data where that is known. Its `parallel.processes` are not
    looked at, for a launcher may start others.
    Raises UserError for what `fit_processes` and `fit_machine` refuse everywhere.
    """
    layout, train = fit_processes(config, None), config.train
    recipe = None if train.fp8.recipe == "none" else train.fp8.recipe
    if recipe or train.precision == "bf16":
        layout.check_dtype(torch.bfloat16)
    _check_sizes(config, layout, Numerics(torch.bfloat16, "te", recipe))
    return layout


def eval_rounds(layout: Layout, samples: int, micro_batch_size: int) -> int:
    """Micro-batches of each rank in which `samples` samples are evaluated, each once; the last ones
    may be filled up.

    An interleaved pipeline takes multiples of its stages.
    """
    rounds = -(-samples // (micro_batch_size * layout.data))
    return -(-rounds // layout.pipeline) * layout.pipeline if layout.virtual > 1 else rounds


def check_passes(config: RunConfig, blend: Blend) -> None:
    """Raises UserError for a step that would take all samples of a data set over and over."""
    batch = config.train.global_batch_size
    for corpus, weight, samples in zip(
        config.data.corpora, blend.weights, blend.samples_per_epoch, strict=True
    ):
        share = weight / sum(blend.weights)
        if (passes := batch * share / samples) > MOST_PASSES:
            most = int(MOST_PASSES * samples / share)
            over = f"a step would go {passes:,.0f} times over {corpus.path}"
            has = f"whose train split has {samples:,} samples"
            raise UserError(f"{BATCH_KEY}={batch}: {over}, {has}: set {most} or less, or prepare more data")


def fit_machine(config: RunConfig, layout: Layout) -> Numerics:
    """What the run computes with on this machine; looks at its GPU, which takes some of its memory.

    Raises UserError for a precision, kernels, losses or a CUDA graph that this machine cannot have.
    Raises UserError for sizes that its FP8 products do not take.
    """
    train = config.train
    numerics = numerics_for(
        train.precision, train.kernels, train.fp8, this_machine(), fp32_residual=train.fp32_residual
    )
    layout.check_dtype(numerics.dtype)
    version = installed(LOSS_KERNELS[train.loss_kernel].package or "torch")
    check_loss_kernel(train.loss_kernel, numerics.dtype, version, gpu=this_machine().gpu is not None)
    _check_sizes(config, layout, numerics)
    if train.gradient_accumulation_fusion:
        check_sums(numerics, this_machine())
    if train.activation_in_product:
        check_activation(numerics)
    if train.cuda_graph:
        from pretrain.train.compiling import check_graphs  # loads Megatron-core

        check_graphs(config.data.seq_length)
    return numerics


def _check_sizes(config: RunConfig, layout: Layout, numerics: Numerics) -> None:
    """Raises UserError for sizes that FP8 products do not take."""
    lengths = {"seq_length": config.data.seq_length, "micro_batch_size": config.train.micro_batch_size}
    check_sizes(numerics, config.model, layout, **lengths)


def check_activation(numerics: Numerics) -> None:
    """Raises UserError where no kernel of ours multiplies matrices."""
    if numerics.joins != "triton":
        raise UserError(
            "train.activation_in_product=true needs a GPU, which its products are made for: set it to false"
        )


def check_sums(numerics: Numerics, machine: Machine) -> None:
    """Raises UserError for gradients that no product of this machine can add to sums in fp32."""
    if numerics.dtype != torch.float32 and machine.gpu is None:
        raise UserError(
            "train.gradient_accumulation_fusion=true needs products of bf16 that add to fp32, which PyTorch "
            "has for GPUs only: set it to false, or train.precision=fp32"
        )
