"""The micro-batches of a step that one data-parallel rank trains on, fetched ahead of time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from parallel.topology import Topology
from pretrain.config.schema import RunConfig
from pretrain.data.blend import Prefetcher, micro_batch_indices
from pretrain.data.documents import in_pieces
from pretrain.data.samples import Samples
from pretrain.data.token_files import DamagedDataError
from pretrain.tasks.task import Batch
from pretrain.train.steps import on_device, own_tokens, shared


class StepBatches:
    """Cuts a run's samples into the micro-batches of one rank."""

    def __init__(self, config: RunConfig, data: Samples, topology: Topology, device: torch.device) -> None:
        self.data, self.device, self.topology = data, device, topology
        self.micro = config.train.micro_batch_size
        self.sizes, self.lengths = config.batch_sizes, config.seq_lengths
        self.layout, self.rank, self.ranks = topology.layout, topology.data_rank, topology.layout.data

    def number(self, step: int) -> int:
        """Micro-batches of a rank in step `step`, 0-based."""
        return self.layout.num_microbatches(self.sizes.at(step), self.micro)

    def ahead(self, first: int, steps: int) -> Prefetcher[list[Batch]]:
        """Reads the batches of `steps` steps from `first` on, in a thread of its own."""
        return Prefetcher(self.fetch, first, steps)

    def fetch(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, 0-based, on the host."""
        size, before = self.sizes.at(step), self.sizes.before(step)
        batches = []
        for k in range(self.number(step)):
            of_step = micro_batch_indices(0, k, self.rank, self.ranks, self.micro, size)
            batches.append(self.data.batch(range(before + of_step.start, before + of_step.stop)))
        labels = self.data.targets(range(before, before + size))
        return shared(self._in_pieces(batches, step), labels, self.layout.replicas)

    def _in_pieces(self, batches: list[Batch], step: int) -> list[Batch]:
        if not self.lengths.grows:
            return batches
        return [in_pieces(batch, self.lengths.at(step)) for batch in batches]

    def next(
        self, fetched: Prefetcher[list[Batch]], step: int, met: Callable[[DamagedDataError], None]
    ) -> list[Batch]:
        """The batches of the next step, the 0-based `step`, on the device.

        A rank whose data are damaged tells `met` and takes part in one more step with other tokens.
        Its vote has to end the run on all ranks, and nothing of that step may be saved.
        """
        try:
            batches = fetched.get()
        except DamagedDataError as error:
            met(error)
            blank = self._in_pieces([self.data.blank(self.micro)] * self.number(step), step)
            batches = shared(blank, self.data.targets(range(1)), 1)
        return [on_device(own_tokens(batch, self.topology), self.device) for batch in batches]
