"""What stands between products, in few passes over memory: `train.kernels: local_joined`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from model.layers.activated import Activated, activate_at_once
from model.layers.compiled import allow_kinds, check_compiler
from model.layers.joined import Joined, join_norms, joined
from model.layers.normed import Normed, norm_at_once
from model.layers.separated import separate_at_once
from model.layers.torch_parts import Separated, activated

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class Passes(NamedTuple):
    """What computes each of them in one pass."""

    joined: Joined
    activated: Activated
    normed: Normed | None = None
    """None: norms after activations stay apart."""
    separated: Separated | None = None
    """None: queries, keys and values stay apart."""
    compiled: bool = False
    """By torch.compile, once for all layers."""


def _by_triton() -> Passes:
    from model.layers.activation_pass import activation_pass
    from model.layers.heads_pass import separate_pass
    from model.layers.join_pass import join_norm
    from model.layers.normed_pass import normed_pass

    return Passes(join_norm, activation_pass, normed_pass, separate_pass)


def _by_compiler() -> Passes:
    check_compiler("train.kernels=local_joined", "train.kernels=local")
    allow_kinds()
    compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
    return Passes(compiled(joined), compiled(activated), compiled=True)


MAKERS: dict[str, Callable[[], Passes]] = {"triton": _by_triton, "compile": _by_compiler}
"""Triton on GPUs, torch.compile on CPUs."""


def pass_at_once(chunks: Iterable[MegatronModule], by: str) -> None:
    """Has joins with their norms, and more, computed in one pass each in training.

    That is activations with their biases, gates and norms; and queries, keys and values taken out
    of their product and turned, backward with the gradient of its bias.
    by: one of `MAKERS`.
    Raises UserError where a compiler is missing.
    """
    chunks, passes = list(chunks), MAKERS[by]()
    join_norms(chunks, passes.joined, compiled=passes.compiled)
    activate_at_once(chunks, passes.activated)
    if passes.normed is not None:
        norm_at_once(chunks, passes.normed)
    if passes.separated is not None:
        separate_at_once(chunks, passes.separated)
