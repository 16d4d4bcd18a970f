"""The loss on held-out samples: of exactly the same ones on every layout, each counted once."""

from __future__ import annotations

import sys

import torch

from parallel.engine.engine import Engine
from parallel.exchange import together
from pretrain.config.schema import RunConfig
from pretrain.data.blend import TokenBlend, micro_batch_indices
from pretrain.train.checks.feasibility import eval_rounds
from pretrain.train.task import Sample, evaluation_step


class Validation:
    """The first `train.eval_samples` samples of the validation split."""

    samples: int
    """How many are evaluated; none without a split."""

    def __init__(self, config: RunConfig, engine: Engine, blend: TokenBlend | None) -> None:
        self.engine, self.blend, self.micro = engine, blend, config.train.micro_batch_size
        wanted = config.train.eval_samples if blend is not None else 0
        self.samples = blend.without_repetition(wanted) if blend is not None else 0
        if self.samples < wanted and torch.distributed.get_rank() == 0:
            windows = f"{self.samples} windows of data.seq_length={config.data.seq_length}"
            print(
                (
                    f"fathom: train.eval_samples={wanted}: "
                    f"the validation split has {windows}, which are all evaluated"
                ),
                file=sys.stderr,
            )

    def loss(self) -> float:
        """Mean loss in nats per token. Collective.

        Raises UserError on all ranks for damaged data.
        """
        rounds = eval_rounds(self.engine.topology.layout, self.samples, self.micro)
        with together():
            batches = [self._batch(index, rounds) for index in range(rounds)]
        return self.engine.evaluate(evaluation_step, lambda: iter(batches), rounds) / self.samples

    def _batch(self, index: int, rounds: int) -> Sample:
        """Micro-batch number `index` of this rank.

        Where samples have run out, copies of one fill it up.
        """
        assert self.blend is not None
        topology = self.engine.topology
        size = topology.layout.data
        wanted = micro_batch_indices(
            0, index, topology.data_rank, size, self.micro, rounds * self.micro * size
        )
        count = max(0, min(len(wanted), self.samples - wanted.start))
        tokens = self.blend.batch(wanted[:count] or range(1))
        filled = torch.cat([tokens, tokens[:1].expand(self.micro - len(tokens), -1)])
        return filled.to(self.engine.device, non_blocking=True), count
