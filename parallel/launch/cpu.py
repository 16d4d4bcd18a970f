"""All that lets Megatron-core run on CPU processes.

Imported on CPU hosts only; a GPU run never sees it.

Megatron-core names CUDA devices in its schedules, point-to-point communication and random states.
Its modules are given a stand-in for the module `torch`,
in which only device-taking factories and `torch.cuda` differ.
Intercepting every torch call instead would cost host time on the hot path.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import types
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
from torch.distributed import ProcessGroupGloo, Store

from parallel.engine.deepspeed_api import no_shared_memory_kernel

P = ParamSpec("P")
T = TypeVar("T")
FACTORIES = (
    "arange",
    "empty",
    "full",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "empty_like",
    "ones_like",
    "zeros_like",
    "full_like",
)


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _redirect(factory: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(factory)
    def on_cpu(*args: P.args, **kwargs: P.kwargs) -> T:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


def _copy_of(module: types.ModuleType, **changes: object) -> types.ModuleType:
    twin = types.ModuleType(module.__name__)
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update(changes)
    return twin


def _stand_in() -> types.ModuleType:
    """A module like torch whose CUDA names mean the CPU."""
    nothing = lambda *args, **kwargs: None  # noqa: E731
    cuda = _copy_of(
        torch.cuda,
        current_device=lambda: "cpu",
        synchronize=nothing,
        current_stream=nothing,
        get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        memory_allocated=lambda *args: 0,
        max_memory_allocated=lambda *args: 0,
    )
    return _copy_of(torch, cuda=cuda, **{name: _redirect(getattr(torch, name)) for name in FACTORIES})


# Numbers of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def mallopt(settings: Mapping[int, int]) -> bool:
    """Sets options of the C library's memory allocator.

    False where the library has no such switch (it is glibc's) or refuses a value.
    """
    switch = getattr(ctypes.CDLL(None), "mallopt", None)
    return switch is not None and all(switch(option, value) for option, value in settings.items())


def keep_freed_memory() -> bool:
    """Has the C library keep what PyTorch frees instead of giving it back to the system.

    A step frees and asks for the same gigabytes again and again,
    and fresh pages cost a fault each, up to 8 % of a step.
    False where `mallopt` says so.
    """
    return mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def _gloo_devices() -> list[Any]:
    """The network interfaces that a group of gloo takes by itself."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not names:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in names.split(",")]


def one_worker_per_group() -> None:
    """Has every gloo group that is made from now on compute its collectives one after another.

    PyTorch gives a group two threads, and both write the name of what they finished into one
    string without a lock. A name of 16 letters or more is memory of its own: of two collectives
    that end together, one writes into what the other has freed. The gathers of compiled layers
    have such a name, and run beside a reduction.
    """
    made = ProcessGroupGloo.__init__

    @functools.wraps(made)
    def with_one_worker(
        self: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta | Any
    ) -> None:
        options = timeout
        if isinstance(timeout, timedelta):
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout, options._threads, options._devices = timeout, 1, _gloo_devices()
        made(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = with_one_worker  # type: ignore[method-assign]


@functools.cache
def enable() -> None:
    """Makes Megatron-core's loaded modules run on the CPU.

    Call after importing them and before using them; more calls do nothing.
    """
    import megatron.core.pipeline_parallel.p2p_communication
    import megatron.core.pipeline_parallel.schedules  # noqa: F401 - loaded, to be changed
    from megatron.core.tensor_parallel import random

    keep_freed_memory()
    one_worker_per_group()
    # Where a gradient vanishes it passes through numbers too small for full precision.
    # A CPU computes many times slower with them: they become zero.
    # Threads that are made later inherit this.
    torch.set_flush_denormal(True)
    stand_in = _stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = stand_in
    no_shared_memory_kernel()
    # These two read torch.cuda through default generators that a CPU build lacks.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # It remarks, in every layer with dropout, that the stream it drew from is the CPU's.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
