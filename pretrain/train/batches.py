"""The micro-batches of a step that one data-parallel rank trains on, fetched ahead of time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parallel.topology import Topology
from pretrain.config.schema import TrainConfig
from pretrain.data.blend import Prefetcher, micro_batch_indices
from pretrain.data.samples import Samples
from pretrain.data.token_files import DamagedDataError
from pretrain.tasks.task import Batch
from pretrain.train.steps import on_device, own_tokens, shared


class StepBatches:
    """Cuts a run's samples into the micro-batches of one rank."""

    number: int
    """Micro-batches of a rank in one step."""

    def __init__(self, train: TrainConfig, data: Samples, topology: Topology, device: torch.device) -> None:
        self.data, self.device, self.topology = data, device, topology
        self.step, self.micro = train.global_batch_size, train.micro_batch_size
        self.rank, self.ranks = topology.data_rank, topology.layout.data
        self.number = topology.layout.num_microbatches(self.step, self.micro)

    def ahead(self, first: int, steps: int) -> Prefetcher[list[Batch]]:
        """Reads the batches of `steps` steps from `first` on, in a thread of its own."""
        return Prefetcher(self.fetch, first, steps)

    def fetch(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, 0-based, on the host."""
        batches = [
            self.data.batch(micro_batch_indices(step, k, self.rank, self.ranks, self.micro, self.step))
            for k in range(self.number)
        ]
        whole = range(step * self.step, (step + 1) * self.step)
        return shared(batches, self.data.targets(whole), self.topology.layout.replicas)

    def next(self, fetched: Prefetcher[list[Batch]], met: Callable[[DamagedDataError], None]) -> list[Batch]:
        """The batches of the next step, on the device.

        A rank whose data are damaged tells `met` and takes part in one more step with other tokens.
        Its vote has to end the run on all ranks, and nothing of that step may be saved.
        """
        try:
            batches = fetched.get()
        except DamagedDataError as error:
            met(error)
            blank = [self.data.blank(self.micro)] * self.number
            batches = shared(blank, self.data.targets(range(1)), 1)
        return [on_device(own_tokens(batch, self.topology), self.device) for batch in batches]
