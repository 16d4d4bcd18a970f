"""Megatron-core's schedule and DeepSpeed's engine joined.

Megatron-core runs forward, backward and the pipeline.
`parallel.engine.gradients` accumulates and reduces.
DeepSpeed owns the sharded optimizer state, the step and the gathering of updated parameters.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.parameters.names import NamedParameter, named_parameters
from model.parameters.table import Row
from parallel.engine import deepspeed_api as api
from parallel.engine import zero3
from parallel.engine.gradients import Gradient, GradientBuffer, Group, build_groups
from parallel.engine.muon import Muon, Orthogonalizer
from parallel.engine.overlap import Overlap
from parallel.engine.self_check import Sample, check_moved, watch
from parallel.engine.step_graph import StepGraph, tracked_generators
from parallel.factors import ONE, Factors
from parallel.optimizers import OptimizerName
from parallel.topology import Topology

ForwardStep = Callable[[Iterator[Any], nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Mean over the global batch."""
    grad_norm: float
    """Before clipping."""
    applied: bool
    """False where the step was left out: a value was not finite, or `accepts` refused it."""
    votes: float
    """Sum over all ranks of what each passed as `vote`."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine trains; the same on all ranks."""

    dtype: torch.dtype
    """Of weights and activations."""
    micro_batch_size: int
    """Samples."""
    seq_length: int
    """Tokens of a sample."""
    clip: float
    """Limit of the global gradient norm, 0 for none."""
    tied: bool
    """Embedding and output share weights."""
    source_length: int = 0
    """Tokens of a sample that an encoder under a decoder reads.

    What stages send each other then has the rows of both (`model/layers/seam.py`).
    """
    decay_embeddings: bool = False
    """Embeddings are decayed as the other matrices are."""
    optimizer: OptimizerName = "adamw"
    """Which one `make_optimizer` makes."""
    cuda_graph: bool = False
    """The passes of a step run as one CUDA graph, of each stage; below ZeRO-3 only."""
    factors: Callable[[Row], Factors] = lambda row: ONE
    """What each parameter multiplies rate, epsilon and decay by."""
    overlap: bool = True
    """Gradients are reduced during the last backward pass, in a graph as part of it.

    Where there are data-parallel ranks. Not under ZeRO-3, nor with `reduce_in_bf16`.
    """
    reduce_in_bf16: bool = False
    """Gradients go to other data-parallel ranks in bf16, after the backward passes.

    Under ZeRO-1 and 2 only.
    """


def _deepspeed_config(topology: Topology, dtype: torch.dtype, micro_batch_size: int) -> dict[str, Any]:
    half = dtype == torch.bfloat16
    zero: dict[str, Any] = {
        "stage": topology.layout.zero,
        "overlap_comm": False,
        "contiguous_gradients": False,
    }
    if topology.layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif topology.layout.zero == 3:
        zero = zero3.zero_config()
    elif topology.layout.zero:
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        # The schedule divides the loss by the number of micro-batches.
        # To DeepSpeed each of our steps is one.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        # PyTorch's fused AdamW updates host memory with vector instructions too.
        # It needs no compiler on the machine.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        # Not finite gradients are found before its step; it would read all of them twice more.
        "bf16": {"enabled": half, "check_grad_overflow": False},
        # With fp32 here DeepSpeed would pick an optimizer that accumulates by itself.
        # Ours accumulates in fp32 in any case.
        "data_types": {"grad_accum_dtype": "bf16" if half and topology.layout.zero < 3 else "fp32"},
        # At stage 3 DeepSpeed reduces; at the other stages `parallel.engine.gradients` does.
        "communication_data_type": "fp32",
    }


class Engine:
    """One training engine per process.

    chunks: model chunks of this rank, several with interleaved pipelines.
    make_optimizer: from DeepSpeed-style parameter groups to a torch optimizer.
    Raises UserError for a precision that the ZeRO stage cannot train.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        topology: Topology,
        make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        options: EngineOptions,
    ) -> None:
        layout = topology.layout
        layout.check_dtype(options.dtype)
        self.chunks, self.topology, self.options = list(chunks), topology, options
        self.clip = options.clip
        self.step_length = options.seq_length
        """Tokens of a sequence in the next steps; a micro-batch has as many tokens as ever."""
        self.parameters: list[NamedParameter] = [
            named
            for chunk in self.chunks
            for named in named_parameters(chunk, topology.tensor_rank, layout.tensor)
        ]
        self.groups: list[Group] = build_groups(
            self.parameters,
            topology,
            tied=options.tied,
            decay_embeddings=options.decay_embeddings,
            optimizer=options.optimizer,
            factors=options.factors,
        )
        optimizer = make_optimizer([_as_deepspeed(group) for group in self.groups])
        self._initialize(optimizer)
        self.zero = layout.zero > 0
        if layout.zero in (1, 2):
            api.keep_weights_cut(self.optimizer)
        self.device = self.parameters[0].parameter.device
        self.models: list[nn.Module] = self.chunks
        if layout.zero == 3:
            self.models = [zero3.Gathering(self.deepspeed, self.chunks[0])]
        self.buffers = self._buffers()
        if isinstance(optimizer, Muon):
            optimizer.orthogonalizers = self._orthogonalizers()
        self.graph = StepGraph(self._fixed(), tracked_generators) if options.cuda_graph else None
        self.overlap = Overlap(self.buffers) if options.overlap and layout.replicas > 1 else None
        self.checked = False
        for chunk in self.chunks:
            if not chunk.training:  # a new one is, and setting it walks all modules
                chunk.train()

    def _initialize(self, optimizer: torch.optim.Optimizer) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        # Below stage 3 it has no use for modules but to walk all of them eight times.
        model = self.chunks[0]
        if self.topology.layout.zero < 3:
            model = nn.ParameterList(named.parameter for named in self.parameters)
        config = _deepspeed_config(self.topology, self.options.dtype, self.options.micro_batch_size)
        with api.quick_initialize():
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, mpu=self.topology, dist_init_required=False
            )

    def _orthogonalizers(self) -> dict[int, Orthogonalizer]:
        return {
            index: Orthogonalizer(buffer, self.options.dtype)
            for index, buffer in enumerate(self.buffers)
            if buffer.group.update.whole and isinstance(buffer, GradientBuffer)
        }

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights of each group, flat. Under ZeRO only.

        They are laid out as the group's gradient partition.
        """
        return api.masters(self.optimizer, self.topology.layout.zero)

    def gathered(self) -> AbstractContextManager[Any]:
        """Inside it every rank holds its parameters whole, to read them. Collective.

        Elsewhere that is so at all stages but 3.
        """
        if self.topology.layout.zero < 3:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([named.parameter for named in self.parameters])  # type: ignore[no-any-return]

    def weights_from_masters(self) -> None:
        """After master weights were set, at stage 3: the weights that forward gathers."""
        for index in range(len(self.groups)):
            api.weights_from_masters(self.optimizer, index)

    def _buffers(self) -> Sequence[Gradient]:
        if self.topology.layout.zero == 3:
            return zero3.scattered(self.groups, self.optimizer, self.topology)
        if not self.zero:
            offsets = [_offsets(group) for group in self.groups]
            return [
                GradientBuffer(group, offset, end, self.topology, sharded=False)
                for group, (offset, end) in zip(self.groups, offsets, strict=True)
            ]
        api.drop_gradient_hooks(self.optimizer, (named.parameter for named in self.parameters))
        buffers = [
            GradientBuffer(group, *api.flat_group(self.optimizer, index), self.topology, sharded=True)
            for index, group in enumerate(self.groups)
        ]
        for buffer in buffers:
            buffer.in_bf16 = self.options.reduce_in_bf16
        return buffers

    def _fixed(self) -> list[Tensor]:
        """What stands for all weights and gradients in their flat groups: each moves as a whole."""
        return [
            tensor
            for buffer in self.buffers
            for tensor in (buffer.partition, buffer.group.parameters[0].parameter)
        ]

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step with these finite values, the same on all ranks, is applied.

        A run may set another function in its place.
        """
        return True

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps, of parameters whose factor is 1."""
        for settings, group in zip(self.deepspeed.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = lr * group.factors.rate

    def _run(
        self,
        forward_step: ForwardStep,
        batches: Callable[[], Iterator[Any]],
        num_microbatches: int,
        *,
        forward_only: bool,
    ) -> list[Any]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        whole, source = self.options.seq_length, self.options.source_length
        length = whole if forward_only else self.step_length
        context = self.topology.layout.context
        self.topology.layout.check_batches(length, num_microbatches, source)
        # Every chunk of an interleaved stage walks the same micro-batches.
        iterators = [batches() for _ in self.chunks]
        single = len(self.models) == 1
        return get_forward_backward_func()(  # type: ignore[no-any-return]
            forward_step_func=forward_step if context == 1 else _of_own_tokens(forward_step, context),
            data_iterator=iterators[0] if single else iterators,
            model=self.models[0] if single else self.models,
            num_microbatches=num_microbatches,
            seq_length=source + length,
            micro_batch_size=self.options.micro_batch_size * (whole // length),
            forward_only=forward_only,
        )

    def train_step(
        self,
        forward_step: ForwardStep,
        batches: Callable[[], Iterator[Any]],
        num_microbatches: int,
        vote: float = 0.0,
        inspect: Callable[[], None] | None = None,
        watched: bool = False,
    ) -> StepResult:
        """One optimizer step over `num_microbatches` micro-batches of this rank.

        batches: makes an iterator over them.
        forward_step: Megatron-core's convention; its loss function returns (loss, detached loss).
        inspect: called when gradients are reduced and not yet clipped.
        watched: modules have hooks, which must run in this step.
        One collective carries norm, loss and votes, so that all ranks take the same decision.
        """
        for buffer in self.buffers:
            buffer.prepare()
        if self.overlap is not None:
            self.overlap.prepare(num_microbatches)
        passes = functools.partial(
            self._run, forward_step, num_microbatches=num_microbatches, forward_only=False
        )
        if self.graph is None:
            losses = passes(batches)
        else:
            losses = self.graph.run(
                functools.partial(self._captured, passes), list(batches()), watched=watched
            )
            if self.overlap is not None:
                self.overlap.repeated()
        for buffer in self.buffers:
            buffer.reduce()
        if inspect is not None:
            inspect()
        squared = torch.stack([buffer.squared_norm() for buffer in self.buffers]).sum()
        squared_norm, loss, votes = self._share(
            [squared, self._mean(losses), torch.tensor(vote, dtype=torch.float64, device=self.device)]
        )
        norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        applied = math.isfinite(norm) and math.isfinite(loss) and self.accepts(loss, norm)
        if applied:
            self._apply(min(1.0, self.clip / (norm + 1e-6)) if self.clip > 0 else 1.0)
        return StepResult(loss, norm, applied, votes)

    def _captured(self, passes: Callable[..., list[Any]], batches: list[Any]) -> list[Any]:
        """What a graph holds: the passes, and the reduction of what they have begun to reduce."""
        losses = passes(lambda: iter(batches))
        if self.overlap is not None:
            self.overlap.land()
        return losses

    def evaluate(
        self,
        forward_step: ForwardStep,
        batches: Callable[[], Iterator[Any]],
        num_microbatches: int,
        sums: int,
    ) -> tuple[float, ...]:
        """Sums over the micro-batches of all ranks, without gradients and dropout.

        forward_step: its loss function returns (loss, what is summed up, [sums] in float64).
        In the memory of a CUDA graph, where there is one.
        """
        if self.graph is not None:
            self.graph.release()
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            losses = self._run(forward_step, batches, num_microbatches, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        if not self._reports(losses):
            losses = [torch.zeros(sums, dtype=torch.float64, device=self.device)]
        return tuple(self._share(list(torch.stack(losses).sum(0).unbind())))

    def total(self, value: float) -> float:
        """The sum of a value over all ranks."""
        return self._share([torch.tensor(value, dtype=torch.float64, device=self.device)])[0]

    def _mean(self, losses: list[Any]) -> Tensor:
        """This rank's share of the mean loss."""
        return self._reported(losses).mean() / self.topology.layout.replicas

    def _reported(self, losses: list[Any]) -> Tensor:
        """Losses that this rank contributes, in float64: one tensor-parallel rank of the last stage
        has them, the others a zero.
        """
        if not self._reports(losses):
            return torch.zeros(1, dtype=torch.float64, device=self.device)
        return torch.stack(losses).double()

    def _reports(self, losses: list[Any]) -> bool:
        return bool(losses) and not self.topology.tensor_rank and self.topology.last_stage

    def _share(self, values: list[Tensor]) -> list[float]:
        packed = torch.stack(values)
        dist.all_reduce(packed)
        return [float(value) for value in packed.tolist()]

    def _apply(self, scale: float) -> None:
        if scale != 1.0:
            for buffer in self.buffers:
                buffer.partition.mul_(scale)
        if self.topology.layout.zero in (1, 2):
            for index, buffer in enumerate(self.buffers):
                api.give_gradient(
                    self.optimizer, index, buffer.partition, offload=self.topology.layout.offload
                )
        watched = [] if self.checked else watch(self._samples())
        self.deepspeed.step()
        check_moved(watched)
        self.checked = self.checked or bool(watched)

    def _samples(self) -> Iterator[Sample]:
        """Of each group some master weights and their gradients."""
        settings = self.deepspeed.optimizer.param_groups
        for index, (group, buffer) in enumerate(zip(self.groups, self.buffers, strict=True)):
            weights = self.masters[index] if self.zero else group.parameters[0].parameter
            flat = weights.detach().flatten()
            gradient = buffer.partition[: flat.numel()]
            rate, eps = float(settings[index]["lr"]), float(settings[index].get("eps", 0.0))
            yield Sample(group.parameters[0].name, flat, gradient, rate, eps)


def _of_own_tokens(forward_step: ForwardStep, ranks: int) -> ForwardStep:
    """A forward step whose loss stays the mean over a rank's own tokens.

    Megatron-core's schedules multiply it by the number of context-parallel ranks; here gradients
    are averaged over them.
    """

    def step(iterator: Iterator[Any], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        output, loss_of = forward_step(iterator, chunk)

        def divided(measured: Tensor) -> tuple[Tensor, Any]:
            loss, reported = loss_of(measured)
            return loss / ranks, reported

        return output, divided

    return step


def _as_deepspeed(group: Group) -> dict[str, Any]:
    return {
        "params": [named.parameter for named in group.parameters],
        "decay": group.decay,
        "whole": group.update.whole,
        "factors": group.factors,
    }


def _offsets(group: Group) -> tuple[list[int], int]:
    offsets, end = [], 0
    for named in group.parameters:
        offsets.append(end)
        end += named.parameter.numel()
    return offsets, end
