"""Optimizers by name: what each keeps of a parameter, what a step costs, what it combines with.

One table. Configuration, engine, checkpoints and predictions ask it; a new optimizer is one entry
here and what makes it, in `pretrain/train/build.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

OptimizerName = Literal["adamw", "muon"]
"""`optimizer.kind`."""

NEWTON_SCHULZ_STEPS = 5
"""Rounds of the iteration that makes Muon's updates orthogonal."""


@dataclass(frozen=True)
class Update:
    """What moves the parameters of one group."""

    name: str
    states: tuple[str, ...]
    """fp32 tensors of the parameter's shape that are kept, by their names in the optimizer's state.

    Checkpoints have them under the same names.
    """
    moved: int
    """Values of four bytes that a step reads and writes for each element."""
    has_epsilon: bool = True
    """`optimizer.eps` is read."""
    products: Callable[[int, int], int] | None = None
    """Operations of a step on a whole matrix [m, n]; None where elements do not need each other."""

    @property
    def whole(self) -> bool:
        """Whether it needs whole matrices, which are gathered from all ranks that hold a part."""
        return self.products is not None


def newton_schulz_operations(m: int, n: int) -> int:
    """Operations that make an update [m, n] orthogonal.

    A round multiplies the shorter side's Gram matrix out, squares it and applies the result.
    """
    short, long = min(m, n), max(m, n)
    return NEWTON_SCHULZ_STEPS * (4 * short * short * long + 2 * short**3)


# Moved by AdamW's kernel: gradient, weight and two moments read, the last three written.
ADAM = Update("adam", ("exp_avg", "exp_avg_sq"), moved=7)
# Moved by Muon's operators: 3 for the mean, 3 for Nesterov's step, 2 for the gathered copy,
# 1 for the zeros below the result, 3 to scale it and put it in place, 5 for decay and weight.
ORTHOGONAL = Update(
    "orthogonal", ("exp_avg",), moved=17, has_epsilon=False, products=newton_schulz_operations
)


@dataclass(frozen=True)
class Optimizer:
    """One optimizer."""

    hidden: Update
    """Of matrices between the embedding and the output projection."""
    others: Update
    """Of everything else."""
    no_zero: Mapping[int, str] = field(default_factory=dict)
    """ZeRO stages that it has no form for -> why."""
    no_offload: str | None = None
    """Why its state cannot be in host memory; None where it can."""
    has_momentum: bool = False
    """`optimizer.momentum` is read."""
    transfers: bool = False
    """`model.transfer` knows its rates."""

    def update(self, *, hidden: bool) -> Update:
        """What moves a parameter."""
        return self.hidden if hidden else self.others


OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw": Optimizer(ADAM, ADAM, transfers=True),
    "muon": Optimizer(
        ORTHOGONAL,
        ADAM,
        no_zero={
            0: "its momentum is kept in ZeRO's flat pieces",
            3: "ZeRO-3 gives no rank the pieces of whole matrices in order",
        },
        no_offload="multiplies matrices in every step, for which parallel.offload.optimizer=true would use "
        "the host's cores",
        has_momentum=True,
    ),
}

STATES: tuple[str, ...] = tuple(
    dict.fromkeys(
        state for one in OPTIMIZERS.values() for update in (one.hidden, one.others) for state in update.states
    )
)
"""Everything that some optimizer keeps."""
