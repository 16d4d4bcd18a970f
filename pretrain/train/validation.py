"""The loss on held-out samples: of exactly the same ones on every layout, each counted once."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from parallel.engine.engine import Engine
from parallel.exchange import together
from pretrain.config.schema import RunConfig
from pretrain.data.blend import micro_batch_indices
from pretrain.data.samples import Samples
from pretrain.tasks.task import Batch
from pretrain.train.checks.feasibility import eval_rounds
from pretrain.train.steps import evaluation_step, on_device, own_tokens


@dataclass(frozen=True)
class Measured:
    """What a model makes of the labels of some samples."""

    loss: float
    """The mean, in nats."""
    labels: int
    accuracy: float | None
    """Share of the labels that are the likeliest token; None where the task does not ask."""
    top5: float | None = None
    """Share of the labels that are among the five likeliest; None where the task does not ask."""


class Validation:
    """The first `train.eval_samples` samples of the validation split."""

    samples: int
    """How many are evaluated; none without a split."""

    def __init__(self, config: RunConfig, engine: Engine, data: Samples | None) -> None:
        self.task = config.task
        self.engine, self.data, self.micro = engine, data, config.train.micro_batch_size
        wanted = config.train.eval_samples if data is not None else 0
        self.samples = data.blend.without_repetition(wanted) if data is not None else 0
        if self.samples < wanted and torch.distributed.get_rank() == 0:
            windows = f"{self.samples} {config.task.unit.format(config.data.seq_length)}"
            print(
                (
                    f"fathom: train.eval_samples={wanted}: "
                    f"the validation split has {windows}, which are all evaluated"
                ),
                file=sys.stderr,
            )

    def measure(self) -> Measured:
        """What the model makes of them now. Collective.

        Raises UserError on all ranks for damaged data.
        """
        rounds = eval_rounds(self.engine.topology.layout, self.samples, self.micro)
        with together():
            batches = [self._batch(index, rounds) for index in range(rounds)]
        total, *hits, targets = self.engine.evaluate(
            evaluation_step(self.task), lambda: iter(batches), rounds, self.task.sums
        )
        first, five = (*(count / targets for count in hits), None, None)[:2]
        return Measured(total / targets, int(targets), first, five)

    def _batch(self, index: int, rounds: int) -> Batch:
        """Micro-batch number `index` of this rank.

        Where samples have run out, copies of one fill it up.
        """
        assert self.data is not None
        topology = self.engine.topology
        size = topology.layout.data
        wanted = micro_batch_indices(
            0, index, topology.data_rank, size, self.micro, rounds * self.micro * size
        )
        count = max(0, min(len(wanted), self.samples - wanted.start))
        numbers = [*wanted[:count], *[0] * (self.micro - count)]
        batch = self.data.batch(numbers)
        weights = batch.get("weights", torch.ones(batch["labels"].shape))
        weights[count:] = 0.0
        return on_device(own_tokens(batch | {"weights": weights}, topology), self.engine.device)
