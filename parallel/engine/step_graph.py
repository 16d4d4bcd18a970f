"""The forward and backward passes of an optimizer step as one CUDA graph.

The host launches it once instead of launching every kernel of every layer.
A pipeline stage's has its whole schedule, messages to and from other stages included,
which wait on the device for each other as they would without a graph.

A graph repeats what the GPU did while it was captured, at the same addresses.
Python does not run again.
That fits our passes because everything that outlives them has its place already:
micro-batches are copied into the same tensors,
gradients are added into the flat buffers of `parallel.engine.gradients`,
weights are views of DeepSpeed's flat groups.
Clipping and the optimizer follow outside, and so does the reduction that does not overlap with the
last backward pass: a few kernels on whole buffers.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from model.errors import UserError

WARM_UP = 3
"""Steps before the capture that run as ever.

Libraries allocate and choose kernels on first use, which no capture may contain.
"""

Batch = Mapping[str, Tensor]
"""Named tensors of a micro-batch, always in the same order."""
Passes = Callable[[list[Batch]], list[Tensor]]
"""From a step's micro-batches to their losses, scalars on the GPU; gradients stay in buffers."""


class StepGraph:
    """Runs the passes of steps: the first as they are, then by a graph captured from them.

    fixed: tensors whose addresses the passes use; where one has moved, the graph is captured anew.
    streams: gives the states of generators that the passes draw from beside the default one.
    capture_s: seconds of the capture that the latest step began with,
    None where it had one already.
    """

    def __init__(
        self, fixed: Sequence[Tensor] = (), streams: Callable[[], Sequence[torch.Generator]] = tuple
    ) -> None:
        self.fixed, self.streams = list(fixed), streams
        # Not the default stream, which a capture cannot be on.
        # The same for all passes, because autograd's nodes remember the stream they were made on.
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.warm = 0
        self.capture_s: float | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.release()

    def release(self) -> None:
        """Drops the graph with its memory; the next step captures another one.

        Also to be called before communicators are destroyed, which wait for graphs that use them.
        """
        if self.graph is not None:
            self.graph.reset()
        self.graph = None
        self.inputs: list[Batch] = []
        self.losses: list[Tensor] = []
        self.addresses: list[int] = []

    def run(self, passes: Passes, batches: list[Batch], *, watched: bool = False) -> list[Tensor]:
        """The passes over these micro-batches, of any shape and number.

        Losses are valid until the next call.
        watched: somebody listens to the modules, whose hooks a graph would not call:
        the passes run as they are, in the memory that the graph held.
        Raises UserError where the passes cannot be captured.
        """
        self.capture_s = None
        if watched or self.warm < WARM_UP:
            self.release()
            self.warm += not watched
            return self._beside(passes, batches)
        if (
            self.graph is None
            or self.addresses != self._addresses()
            or shapes(self.inputs) != shapes(batches)
        ):
            self.release()
            self._capture(passes, batches)
        assert self.graph is not None
        for static, batch in zip(self.inputs, batches, strict=True):
            for name, tensor in static.items():
                tensor.copy_(batch[name])
        self.graph.replay()
        return self.losses

    def _addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.fixed]

    def _beside(self, passes: Passes, batches: list[Batch]) -> list[Tensor]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            losses = passes(batches)
        torch.cuda.current_stream().wait_stream(self.stream)
        return losses

    def _capture(self, passes: Passes, batches: list[Batch]) -> None:
        begin = time.perf_counter()
        self.inputs = [{name: tensor.clone() for name, tensor in batch.items()} for batch in batches]
        self.addresses = self._addresses()
        graph = torch.cuda.CUDAGraph()
        for state in self.streams():
            # Each replay then goes on from where the stream is, as eager passes would.
            graph.register_generator_state(state)
        try:
            # Other threads (communication, data, checkpoints) may go on with their own work.
            with _collected(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.losses = passes(self.inputs)
        except RuntimeError as error:
            cause = _first(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise UserError(
                f"train.cuda_graph=true: the step cannot be captured ({line}): set train.cuda_graph=false"
            ) from error
        self.graph = graph
        self.capture_s = time.perf_counter() - begin


def tracked_generators() -> list[torch.Generator]:
    """Megatron-core's random streams, which take the default generator's place for a while.

    Empty where they are kept as bytes, which no graph can draw from.
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return [state for state in get_cuda_rng_tracker().get_states().values() if not isinstance(state, Tensor)]


def shapes(batches: Sequence[Batch]) -> list[list[tuple[str, torch.Size]]]:
    """Names and shapes of every micro-batch."""
    return [[(name, tensor.shape) for name, tensor in batch.items()] for batch in batches]


@contextlib.contextmanager
def _collected() -> Iterator[None]:
    """Without garbage and without collection.

    Garbage would stay allocated beside the graph.
    A collection may destroy another graph in the middle of a capture.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _first(error: RuntimeError) -> RuntimeError:
    """What went wrong first: ending a failed capture raises an error of its own."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
