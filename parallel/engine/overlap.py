"""Gradients on their way to other data-parallel ranks while the last backward pass still runs.

Backward passes walk the layers from the last to the first.
A flat gradient buffer holds the layers from the first to the last.
So when the gradients of a layer begin to arrive for the last time in a step,
everything behind that layer in the buffer is final.
A few layers a buffer are marked: one hook each,
where DeepSpeed's own overlap has a hook on every parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from parallel.engine.gradients import Gradient, GradientBuffer, Kind

PIECES = 8
"""Parts in which a buffer is reduced.

The last one is not hidden.
Each costs the latency of a collective for every rank whose partition it touches.
"""
SMALLEST = 1 << 20
"""Elements below which a buffer is reduced at once, at the end."""


class Overlap:
    """Begins the reduction of final pieces of these buffers in backward passes.

    Left to the end are small buffers,
    and those whose sums over tensor-parallel ranks or tied embeddings come first.
    """

    def __init__(self, buffers: Sequence[Gradient]) -> None:
        self.passes = 0
        self.seen: list[int] = []
        self.begun: dict[GradientBuffer, int] = {}
        """Buffers of which pieces leave early -> the first element that does."""
        for buffer in buffers:
            if (
                isinstance(buffer, GradientBuffer)
                and buffer.group.kind in (Kind.SHARDED, Kind.REPLICATED)
                and buffer.flat.numel() >= SMALLEST
            ):
                self.begun[buffer] = buffer.flat.numel()
                for parameter, low in marks(buffer):
                    hook = self._hook(buffer, low)
                    parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def prepare(self, num_microbatches: int) -> None:
        """Before the first of that many backward passes."""
        self.passes = num_microbatches
        self.seen = [0] * len(self.seen)

    def land(self) -> None:
        """Waits, at the end of passes that a graph repeats, for what they have begun.

        A graph may leave nothing under way.
        """
        for buffer in self.begun:
            buffer.land()
            self.begun[buffer] = buffer.started

    def repeated(self) -> None:
        """After a graph did in these buffers what its passes do, without their Python."""
        for buffer, low in self.begun.items():
            buffer.started = low

    def _hook(self, buffer: GradientBuffer, low: int) -> Callable[[Tensor], None]:
        number = len(self.seen)
        self.seen.append(0)

        def passed(parameter: Tensor) -> None:
            self.seen[number] += 1
            if self.seen[number] == self.passes:
                buffer.start(low)

        return passed


def marks(buffer: GradientBuffer) -> list[tuple[Tensor, int]]:
    """(parameter, element) pairs, from the end of the buffer to its beginning.

    Once the parameter's last gradient of a step has arrived,
    the buffer is final from that element on.
    A marked parameter belongs to the layer before the piece that it declares final.
    Its last gradient is a sign that backward has left that piece.
    """
    ends: dict[int, tuple[Tensor, int]] = {}
    for named, offset in zip(buffer.group.parameters, buffer.offsets, strict=True):
        if named.row.layer is not None:
            ends[named.row.layer] = (named.parameter, offset + named.parameter.numel())
    assert all(first < second for first, second in pairwise(buffer.offsets)), (
        "parameters of a group lie in order"
    )
    found, high = [], buffer.flat.numel()
    for parameter, end in reversed(list(ends.values())):
        if high - end >= buffer.flat.numel() / PIECES:
            found.append((parameter, end))
            high = end
    return found
