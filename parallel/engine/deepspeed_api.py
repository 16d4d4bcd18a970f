"""Every name of DeepSpeed that is not public and that Fathom reaches into, in one place.

Each is looked up by `require`, which refuses a release that has it not, or has it with another
signature. So a renamed method ends a start with one line instead of training wrongly. What a
signature cannot show, whether a step moves the weights, `parallel.engine.self_check` looks at.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.errors import UserError


class ZeroOptimizer(Protocol):
    """What is used of DeepSpeed's sharded optimizers."""

    optimizer: torch.optim.Optimizer
    """The one that was given to DeepSpeed, over flat partitions."""
    param_groups: list[dict[str, Any]]


def require(owner: object, name: str, parameters: Sequence[str] | None = None) -> Any:
    """The attribute `name` of a DeepSpeed class, module or object.

    parameters: names that its signature must have, `self` included for a function of a class.
    Raises UserError, naming the supported releases, where it is missing or its signature differs.
    """
    where = owner.__name__ if inspect.isclass(owner) or inspect.ismodule(owner) else type(owner).__name__
    try:
        found = getattr(owner, name)
    except AttributeError:
        raise _unsupported(f"has no {where}.{name}") from None
    if parameters is not None:
        has = list(inspect.signature(found).parameters)
        if has != list(parameters):
            raise _unsupported(f"has {where}.{name}({', '.join(has)}) for ({', '.join(parameters)})")
    return found


def _unsupported(what: str) -> UserError:
    from parallel.hardware.versions import installed, supported

    wanted = supported().get("deepspeed", "")
    return UserError(
        f"deepspeed {installed('deepspeed')} {what}, which Fathom works through: install deepspeed{wanted}"
    )


def _set(owner: object, name: str, value: object, parameters: Sequence[str] | None = None) -> None:
    require(owner, name, parameters)
    setattr(owner, name, value)


@contextlib.contextmanager
def quick_initialize() -> Iterator[None]:
    """Inside it a DeepSpeed engine is made without what costs most of a deep model's start.

    Its check for duplicates rebuilds the list of all ids once per parameter.
    With sets it is linear.
    Its broadcast of every parameter is left out:
    weights are drawn by global name and equal on all ranks by construction.
    So are its passes for a compiler that Fathom does not use.
    """
    from deepspeed import DeepSpeedEngine

    def check(self: object, optimizer: torch.optim.Optimizer) -> None:
        seen: set[int] = set()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in seen:
                    raise ValueError("a parameter occurs twice in the optimizer's groups")
                seen.add(id(parameter))

    changes: dict[str, tuple[list[str], Callable[..., None]]] = {
        "_check_for_duplicates": (["self", "optimizer"], check),
        "_broadcast_model": (["self"], lambda self: None),
        "register_compile_pass": (
            ["self", "pass_name", "pass_fn", "contract"],
            lambda self, *args, **kwargs: None,
        ),
    }
    saved = {name: require(DeepSpeedEngine, name, parameters) for name, (parameters, _) in changes.items()}
    for name, (_, change) in changes.items():
        setattr(DeepSpeedEngine, name, change)
    try:
        yield
    finally:
        for name, original in saved.items():
            setattr(DeepSpeedEngine, name, original)


def keep_weights_cut(optimizer: ZeroOptimizer) -> None:
    """Stages 1 and 2: weights stay the views of the flat groups that they are.

    After every step DeepSpeed would cut each anew: 0.17 s at 1000 layers.
    """
    _set(optimizer, "_update_model_bit16_weights", lambda group_index: None, ["group_index"])


def weights_cut_anew(optimizer: ZeroOptimizer) -> Callable[..., None]:
    """Stages 1 and 2: what `keep_weights_cut` took out.

    For `benchmarks/ablation.py`, which puts it back to measure what it costs.
    """
    return functools.partial(require(type(optimizer), "_update_model_bit16_weights"), optimizer)


def drop_gradient_hooks(optimizer: ZeroOptimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Stages 1 and 2: gradients are left to backward, where `parallel.engine.gradients` takes them.

    Raises UserError where a hook of DeepSpeed's is left: it would reduce gradients a second time.
    """
    hooks = require(optimizer, "_grad_acc_hooks")
    for hook in hooks:
        hook.remove()
    hooks.clear()
    left = sum(bool(getattr(parameter, "_post_accumulate_grad_hooks", None)) for parameter in parameters)
    if left:
        raise _unsupported(f"keeps hooks on the gradients of {left} parameters")


def flat_group(optimizer: ZeroOptimizer, index: int) -> tuple[list[int], int]:
    """Stages 1 and 2: where each parameter begins in a group's flat tensor, and its padded size."""
    offsets = require(optimizer, "round_robin_bit16_offsets")[index]
    return offsets, require(optimizer, "bit16_groups_flat")[index].numel()


def masters(optimizer: ZeroOptimizer, stage: int) -> list[Tensor]:
    """This rank's flat fp32 master weights of each group, [n] each. stage: of ZeRO, 1 to 3."""
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return require(optimizer, name)  # type: ignore[no-any-return]


def give_gradient(optimizer: ZeroOptimizer, index: int, partition: Tensor, *, offload: bool) -> None:
    """Stages 1 and 2: the gradient [n], in fp32, that the next step takes for a group's partition.

    offload: the optimizer's state lies in host memory.
    """
    from deepspeed.runtime.zero import stage_1_and_2

    if offload:
        masters(optimizer, 1)[index].grad.copy_(partition)  # type: ignore[union-attr]
        return
    buffers = require(stage_1_and_2, "GradPartitionBufferGroup", ["grad_buffers", "flat_partition"])
    require(optimizer, "averaged_gradients")[index] = buffers([partition], partition)


def weights_from_masters(optimizer: ZeroOptimizer, index: int) -> None:
    """Stage 3: makes a group's weights, from which forward gathers, equal to its master weights."""
    require(optimizer, "_reassign_or_swap_out_partitioned_parameters")(index)


def gradient_partitions(optimizer: ZeroOptimizer) -> Tensor:
    """Stage 3: the flat fp32 buffer of all gradients' partitions on this rank, group by group."""
    return require(optimizer, "grad_partitions_flat_buffer")  # type: ignore[no-any-return]


def begin_accumulation(optimizer: ZeroOptimizer) -> None:
    """Stage 3: the next gradients replace what is there.

    Only DeepSpeed's own step resets these two.
    """
    _set(optimizer, "micro_step_id", 0)
    _set(optimizer, "_epilogue_ran_this_backward", False)


def skip_norm(optimizer: ZeroOptimizer) -> None:
    """Stage 3: its own gradient norm, which nobody reads, is not computed."""
    device = require(optimizer, "device")
    _set(optimizer, "_get_norm_groups", lambda: [torch.zeros((), device=device)])


def no_shared_memory_kernel() -> None:
    """On CPUs DeepSpeed does not compile its shared-memory collectives.

    Compiling takes most of a minute at the first start, and gloo does them as well.
    """
    import deepspeed.comm.torch  # noqa: F401 - loaded, to be changed

    # By sys.modules: the attribute `deepspeed.comm.torch` is PyTorch itself.
    _set(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None, [])
