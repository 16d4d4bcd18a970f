"""Our layers on one process, for research, tests and tools: no launcher, no data parallelism."""

from __future__ import annotations

import functools

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.launch.process_group import init_process_group, open_store
from parallel.launch.ranks import ALONE
from parallel.topology import Topology, check_layout


@functools.cache
def single_process() -> Topology:
    """Makes this process a world of one, with random streams seeded with 0.

    More calls give the same topology.
    Raises RuntimeError where torch.distributed is initialised already.
    """
    smallest = ModelConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    init_process_group(ALONE, 10, open_store(ALONE, 10))
    topology = Topology(check_layout(ParallelConfig(), smallest, 1))
    from megatron.core import tensor_parallel  # loaded by then

    tensor_parallel.model_parallel_cuda_manual_seed(0)
    return topology
