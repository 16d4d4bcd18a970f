"""The one object that knows the parallel layout.

That is: degrees, ranks, process groups, and what DeepSpeed asks of its `mpu`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.errors import UserError
from parallel.config import ParallelConfig

BATCH_KEY = "train.global_batch_size"
"""Where the samples of a step stand in a configuration."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a run; valid by construction (`check_layout`)."""

    world: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    zero: int
    sequence_parallel: bool
    pipeline_split: tuple[int, ...] | None
    offload: bool = False

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters and other tokens: data x context.

        Gradients are averaged over them, and ZeRO cuts over them.
        """
        return self.data * self.context

    def summary(self) -> dict[str, int]:
        """Degrees by their usual abbreviations, for logs."""
        return {
            "tp": self.tensor,
            "pp": self.pipeline,
            "vp": self.virtual,
            "cp": self.context,
            "dp": self.data,
            "zero": self.zero,
        }

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises UserError for weights of a type that the ZeRO stage cannot train."""
        if self.zero == 0 and dtype != torch.float32:
            raise UserError(
                "parallel.zero=0 keeps no fp32 copy of bf16 weights: use parallel.zero=1, "
                "or train.precision=fp32"
            )

    def num_microbatches(self, global_batch_size: int, micro_batch_size: int, key: str = BATCH_KEY) -> int:
        """Micro-batches of one rank in a step. key: where the first number stands.

        Raises UserError where a step does not divide into them.
        """
        share = micro_batch_size * self.data
        if global_batch_size % share:
            nearest = max(1, round(global_batch_size / share)) * share
            raise UserError(
                f"{key}={global_batch_size} is not divisible by train.micro_batch_size x "
                f"data-parallel ranks = {micro_batch_size} x {self.data} = {share}: "
                f"set {key}={nearest}, or change the others"
            )
        return global_batch_size // share

    def check_batches(
        self,
        seq_length: int,
        num_microbatches: int,
        source_length: int | None = None,
        *,
        batch_key: str = BATCH_KEY,
        length_key: str = "data.seq_length",
    ) -> None:
        """Raises UserError where the schedule cannot cut up a step.

        seq_length: of every sequence, in tokens.
        num_microbatches: micro-batches per rank in the step.
        source_length: of what an encoder under a decoder reads.
        batch_key, length_key: where the step's size and the first length stand.
        """
        pieces = 2 * self.context * (self.tensor if self.sequence_parallel else 1)
        if self.context > 1 and seq_length % pieces:
            also = " x parallel.tensor, as parallel.sequence_parallel needs" if self.sequence_parallel else ""
            raise UserError(
                f"{length_key}={seq_length} is not divisible by {pieces}, the pieces of "
                f"2 x parallel.context{also}: use {-(-seq_length // pieces) * pieces}"
            )
        for key, length in ((length_key, seq_length), ("data.source_length", source_length or 0)):
            if self.sequence_parallel and length % self.tensor:
                raise UserError(
                    f"{key}={length} is not divisible by parallel.tensor={self.tensor}, "
                    f"as parallel.sequence_parallel needs: use {-(-length // self.tensor) * self.tensor}"
                )
        if self.virtual > 1 and num_microbatches % self.pipeline:
            raise UserError(
                f"{num_microbatches} micro-batches per step and rank are not a multiple of "
                f"parallel.pipeline={self.pipeline}, as parallel.virtual_stages={self.virtual} needs: "
                f"change {batch_key} or train.micro_batch_size, or set parallel.virtual_stages=1"
            )


def _check_reduction(config: ParallelConfig, alone: bool) -> None:
    """Raises UserError where gradients cannot be reduced as asked. alone: by one rank."""
    if config.overlap_grad_reduce and alone:
        raise UserError(
            "parallel.overlap_grad_reduce=true has no effect with one data-parallel rank: set it to null"
        )
    if config.grad_reduce != "fp32":
        _check_narrow(config, alone)
    if config.overlap_grad_reduce and config.zero == 3:
        raise UserError(
            "parallel.overlap_grad_reduce=true does not combine with parallel.zero=3, "
            "where DeepSpeed reduces gradients: set it to null"
        )


def _check_narrow(config: ParallelConfig, alone: bool) -> None:
    """Raises UserError where gradients cannot be sent in a narrower format."""
    own = f"parallel.grad_reduce={config.grad_reduce}"
    if alone:
        raise UserError(f"{own} has no effect with one data-parallel rank: set it to fp32")
    if config.zero not in (1, 2):
        raise UserError(
            f"{own} sends each rank its partition of the gradient, and parallel.zero={config.zero} "
            "has none: set parallel.zero=1 or parallel.grad_reduce=fp32"
        )
    if config.overlap_grad_reduce:
        raise UserError(
            f"{own} does not combine with parallel.overlap_grad_reduce=true: all partitions are exchanged "
            "at once, after the backward passes; set it to null"
        )


def check_layout(config: ParallelConfig, model: ModelConfig, world: int | None) -> Layout:
    """The layout of a run over `world` processes.

    world: None where nothing says how many there will be: as few as the degrees take. What only
    more data-parallel ranks give an effect is then let be.
    Raises UserError for an impossible or harmful combination, naming a working choice.
    """
    degrees = config.tensor * config.pipeline * config.context
    processes = degrees if world is None else world
    if processes % degrees:
        raise UserError(
            f"parallel: tensor x pipeline x context = {config.tensor} x {config.pipeline} x {config.context} "
            f"= {degrees} does not divide {processes} processes: "
            f"use parallel.processes={max(1, round(processes / degrees)) * degrees} or smaller degrees"
        )
    replicas = processes // degrees * config.context
    _check_reduction(config, alone=replicas == 1 and world is not None)
    _check_model(config, model)
    _check_pipeline(config, model)
    _check_context(config, model)
    if config.zero == 3 and config.pipeline > 1:
        raise UserError(
            f"parallel.zero=3 with parallel.pipeline={config.pipeline}: "
            "gathered parameters would be dropped and fetched again for every micro-batch in flight, "
            "and no test has proven it equal to one process. Use parallel.zero=1 or 2, "
            "or parallel.pipeline=1"
        )
    if config.offload.optimizer and config.zero not in (1, 2):
        raise UserError(
            "parallel.offload.optimizer=true moves the state that ZeRO-1 and 2 shard, "
            f"and parallel.zero={config.zero}: set parallel.zero=1"
        )
    return Layout(
        processes,
        config.tensor,
        config.pipeline,
        config.virtual_stages,
        config.context,
        processes // degrees,
        config.zero,
        config.sequence_parallel,
        _split(config, model),
        config.offload.optimizer,
    )


def _split(config: ParallelConfig, model: ModelConfig) -> tuple[int, ...] | None:
    if config.pipeline_split == "auto":
        return balanced_split(model, config.pipeline)
    return tuple(config.pipeline_split) if config.pipeline_split else None


def _check_model(config: ParallelConfig, model: ModelConfig) -> None:
    tensor = config.tensor
    sizes = [
        ("num_attention_heads", model.num_attention_heads),
        ("num_query_groups", model.groups),
        ("ffn_hidden_size", model.ffn_size),
    ]
    for stack in model.blueprint.stacks[:-1]:
        own = model.of(stack)
        sizes += [
            (f"{stack.name}_attention_heads", own.num_attention_heads),
            (f"{stack.name}_ffn_hidden_size", own.ffn_size),
        ]
    for key, value in sizes:
        if value % tensor:
            nearest = max(size for size in range(1, tensor) if value % size == 0)
            raise UserError(
                f"model.{key}={value} is not divisible by parallel.tensor={tensor}: "
                f"set parallel.tensor={nearest}, or another size that divides it"
            )
    if model.vocab_size is not None and model.padded_vocab % tensor:
        raise UserError(
            f"model.vocab_multiple={model.vocab_multiple} is not divisible by parallel.tensor={tensor}: "
            f"set model.vocab_multiple={model.vocab_multiple * tensor}"
        )
    if config.sequence_parallel and tensor == 1:
        raise UserError(
            "parallel.sequence_parallel=true has no effect with parallel.tensor=1: "
            "set it to false or raise parallel.tensor"
        )


def _check_context(config: ParallelConfig, model: ModelConfig) -> None:
    if config.context > 1 and (model.blueprint.crossed or not model.stack.causal):
        raise UserError(
            f"parallel.context={config.context} does not combine with model.family={model.family}: "
            "sequences are cut so that causal attention is balanced, and only decoders have that; "
            "set parallel.context=1"
        )


def balanced_split(model: ModelConfig, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, so that all have about the same number of sublayers.

    The largest stage is as small as it can be, because the others wait for it; then the stages are
    as alike as can be; then the earlier ones have more, because the last one also has the head.
    Raises UserError for more stages than layers.
    """
    costs = tuple(
        stack.sublayers for stack in model.blueprint.stacks for _ in range(model.of(stack).num_layers)
    )
    if stages > len(costs):
        raise _too_many(stages, len(costs), _depth(model))
    return _split_evenly(costs, stages)


@functools.cache
def _split_evenly(costs: tuple[int, ...], stages: int) -> tuple[int, ...]:
    done = [0, *itertools.accumulate(costs)]
    limit = max(*costs, -(-done[-1] // stages))
    while _stages_needed(costs, limit) > stages:
        limit += 1
    # From the last stage to the first: the least sum of squares of the layers from each one on.
    rest = {len(costs): 0}
    chosen: list[dict[int, int]] = []
    for _ in range(stages):
        least: dict[int, tuple[int, int]] = {}
        for end, squares in rest.items():
            for start in range(end - 1, -1, -1):
                own = done[end] - done[start]
                if own > limit:
                    break
                least[start] = min(least.get(start, (squares + own**2, -end)), (squares + own**2, -end))
        rest = {start: squares for start, (squares, _) in least.items()}
        chosen.append({start: -end for start, (_, end) in least.items()})
    ends = [0]
    for ends_of in reversed(chosen):
        ends.append(ends_of[ends[-1]])
    return tuple(end - start for start, end in itertools.pairwise(ends))


def _stages_needed(costs: Sequence[int], limit: int) -> int:
    """Stages of at most `limit` sublayers that hold all layers."""
    needed, filled = 1, 0
    for cost in costs:
        if filled + cost > limit:
            needed, filled = needed + 1, 0
        filled += cost
    return needed


def _depth(model: ModelConfig) -> str:
    """The keys that say how many layers a model has, and how many."""
    keys = "model.encoder_layers + model.num_layers" if model.blueprint.crossed else "model.num_layers"
    return f"{keys}={model.total_layers}"


def _too_many(stages: int, layers: int, depth: str) -> UserError:
    return UserError(
        f"parallel.pipeline={stages} stages are more than {depth}: use parallel.pipeline={layers} or less"
    )


def _check_pipeline(config: ParallelConfig, model: ModelConfig) -> None:
    stages, chunks, layers = config.pipeline, config.virtual_stages, model.total_layers
    depth = _depth(model)
    if config.pipeline_split is not None:
        split = config.pipeline_split
        if split != "auto" and (len(split) != stages or sum(split) != layers or min(split) < 1):
            raise UserError(
                f"parallel.pipeline_split={split} must have {stages} positive entries "
                f"(parallel.pipeline) that sum to {depth}"
            )
        if chunks > 1:
            raise UserError(
                f"parallel.pipeline_split does not combine with parallel.virtual_stages={chunks}: "
                "set parallel.virtual_stages=1 or remove the split"
            )
        if split == "auto" and stages == 1:
            raise UserError(
                "parallel.pipeline_split=auto has no effect with parallel.pipeline=1: "
                "set it to null or raise parallel.pipeline"
            )
    if layers < stages:
        raise _too_many(stages, layers, depth)
    if config.pipeline_split is None and layers % stages:
        raise UserError(
            f"{depth} is not divisible by parallel.pipeline={stages}: "
            f"set parallel.pipeline_split={list(balanced_split(model, stages))}"
        )
    if chunks > 1 and stages == 1:
        raise UserError(
            f"parallel.virtual_stages={chunks} has no effect with parallel.pipeline=1: "
            "set it to 1 or raise parallel.pipeline"
        )
    if chunks > 1 and layers % (stages * chunks):
        raise UserError(
            f"{depth} is not divisible by parallel.pipeline x parallel.virtual_stages = "
            f"{stages * chunks}: choose parallel.virtual_stages that divides {layers // stages}"
        )


class Topology:
    """Process groups of a layout.

    Also DeepSpeed's `mpu`: Megatron-core's parallel_state plus the three methods it lacks.
    It must not offer `initialize_sequence_parallel`, which DeepSpeed would take for Ulysses.
    """

    def __init__(self, layout: Layout) -> None:
        """Creates Megatron-core's groups.

        torch.distributed must be initialised with `layout.world` processes.
        """
        from megatron.core import parallel_state

        self.layout = layout
        self._state = parallel_state
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            context_parallel_size=layout.context,
        )
        self.tensor_rank: int = parallel_state.get_tensor_model_parallel_rank()
        self.pipeline_rank: int = parallel_state.get_pipeline_model_parallel_rank()
        self.context_rank: int = parallel_state.get_context_parallel_rank()
        self.data_rank: int = parallel_state.get_data_parallel_rank()
        """Which samples of a step this rank gets: context-parallel ranks get the same ones."""
        self.replica_rank: int = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        self.replica_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        """The ranks of `Layout.replicas`."""
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.embedding_group = (
            parallel_state.get_embedding_group() if self.first_stage or self.last_stage else None
        )

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_rank == self.layout.pipeline - 1

    def core_fields(self) -> dict[str, object]:
        """Megatron-core's configuration fields that describe the layout."""
        layout = self.layout
        interleaved = layout.virtual > 1
        fields: dict[str, object] = {
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.pipeline,
            "virtual_pipeline_model_parallel_size": layout.virtual if interleaved else None,
            "context_parallel_size": layout.context,
            "sequence_parallel": layout.sequence_parallel,
            # With two stages, batched point-to-point messages of an interleaved schedule swap.
            # Separate ones do not.
            "overlap_p2p_comm": interleaved,
            "batch_p2p_comm": not interleaved,
            # Freeing an output while its send is still in flight is ordered by CUDA's streams.
            # gloo would send freed memory.
            "deallocate_pipeline_outputs": layout.pipeline > 1 and torch.cuda.is_available(),
        }
        if layout.pipeline_split is not None:
            fields["pipeline_model_parallel_layout"] = split_layout(layout.pipeline_split)
        return fields

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name.startswith("get_"):
            getter: Callable[..., object] = getattr(self._state, name)
            return getter
        raise AttributeError(name)

    def get_model_parallel_rank(self) -> int:
        """Rank over tensor x pipeline; DeepSpeed names shards and the norm group by it."""
        return self.tensor_rank + self.layout.tensor * self.pipeline_rank

    def get_model_parallel_world_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.layout.tensor * self.layout.pipeline

    def get_data_parallel_group(self) -> torch.distributed.ProcessGroup:
        """What DeepSpeed cuts and averages over: the ranks that hold the same parameters."""
        group: torch.distributed.ProcessGroup = self.replica_group
        return group

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return self.replica_rank

    def get_data_parallel_world_size(self) -> int:
        """Ranks of that group."""
        return self.layout.replicas

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of that group."""
        return list(torch.distributed.get_process_group_ranks(self.replica_group))


def split_layout(split: tuple[int, ...]) -> str:
    """Megatron-core's notation of an uneven split.

    E embedding, t layer, L loss, stages parted by '|'.
    """
    stages = ["t" * count for count in split]
    stages[0] = "E" + stages[0]
    stages[-1] += "L"
    return "|".join(stages)
