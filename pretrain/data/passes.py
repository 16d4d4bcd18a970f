"""Shuffled passes over numbered things: rows of pairs, images."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from pretrain.data.order import epoch_key, permutation

EPOCHS_OPEN = 2
"""Orders kept: prefetching may reach into the next pass."""


class Passes:
    """One permutation a pass, made when it is first asked for.

    Safe to share between a prefetching thread and its owner.
    """

    def __init__(self, count: int, seed: int | None, identity: str) -> None:
        """count: of the things. identity: of their data set and split.

        seed: None for evaluations, which are compared between runs: all passes have one order then.
        """
        self.count, self.identity = count, identity
        self.fixed, self.seed = seed is None, seed or 0
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of one pass, int64 [count], in the order of training."""
        epoch = 0 if self.fixed else epoch
        with self._lock:
            if epoch not in self._orders:
                key = epoch_key(self.seed, self.identity, epoch)
                self._orders[epoch] = permutation(np.random.Philox(key=key), self.count)
                while len(self._orders) > EPOCHS_OPEN:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def locate(self, sample: int) -> int:
        """The number of the thing that is sample number `sample`, counted over all passes."""
        epoch, place = divmod(sample, self.count)
        return int(self.order(epoch)[place])
