"""What stands between products, in few passes over memory: `train.kernels: local_joined`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from model.layers.activated import activate_at_once
from model.layers.joined import join_norms
from model.layers.separated import separate_at_once

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def pass_at_once(chunks: Iterable[MegatronModule], by: str) -> None:
    """Has joins with their norms, and more, computed in one pass each in training.

    That is activations with their biases and gates; and queries, keys and values taken out of their
    product and turned, backward with the gradient of its bias.
    by: one of `MAKERS` in `model/layers/joined.py`.
    Raises UserError where a compiler is missing.
    """
    chunks = list(chunks)
    join_norms(chunks, by)
    activate_at_once(chunks, by)
    separate_at_once(chunks, by)
