"""A process that stands for rank 0 of tensor-parallel ranks which are not there.

What it computes is worth nothing where ranks exchange values, for they come back as they were; what
it would do can be counted. No network, no GPU and no other process is touched.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from parallel.launch.startup import collector_at_rest, compiled_when_called


@contextlib.contextmanager
def pretended_ranks(tensor: int = 1, *, draws: bool = False) -> Iterator[None]:
    """Inside it Megatron-core's layers can be built as on one of that many tensor-parallel ranks.

    draws: random states are asked for, by dropout or recomputation.
    A process that is in a world already is taken as it is.
    Raises RuntimeError where that has another tensor-parallel size.
    """
    if dist.is_initialized():
        from megatron.core import parallel_state

        if parallel_state.get_tensor_model_parallel_world_size() != tensor:
            raise RuntimeError(f"this process is in a world already, and not of {tensor} ranks")
        yield
        return
    with collector_at_rest(), compiled_when_called(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of packages that are missing
        from megatron.core import parallel_state, tensor_parallel
    if (tensor > 1 or draws) and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from parallel.launch import cpu

        cpu.enable()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    try:
        with torch.random.fork_rng(devices=[]):
            parallel_state.initialize_model_parallel(tensor, create_gloo_process_groups=False)
            if tensor > 1 or draws:
                tensor_parallel.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
