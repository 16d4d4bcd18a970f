"""torch.compile for the layers of a stack: one compilation that all layers share.

Each layer is compiled as a function of its inputs and weights, so that a thousand layers cost one
compilation. What differs between layers would cost one each.
Numbers that a scheme varies with depth are handed over as scalars in tensors,
and a scheme with two kinds of layers compiles twice.
In very deep stacks some layers in a row are one call: a call costs the host as much as an
operator or ten.

PyTorch's guards compare a layer's attributes with those it was compiled for before every call of
it, 0.1 ms each time. Nothing but shape and format of the input can change between two calls,
so that each layer is guarded once per shape and format, and not again.
Whoever changes an attribute of a layer between two steps sets FATHOM_GUARDS=1:
all guards run at every call then.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.errors import UserError
from model.layers.layer import DepthLayer
from model.layers.residual import ResidualJoin, join

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_block import TransformerBlock

RECOMPILES = 8
"""Compilations of one function that PyTorch makes before it gives up."""
LAYER_KINDS = 64
"""Compilations of the layers' function before something is wrong.

Each kind of layer takes one, and one more for each shape and format of the input, and where it is
computed again. A fault would take one for each layer.
"""
GROUP, GROUPED_FROM = 8, 192
"""Layers that are called as one, and how many of a chunk are deep enough for it.

The gradients of all of them exist at once, which is little where layers are narrow.
"""
COMPILERS = ("g++", "clang++", "c++")


def _forward(layers: tuple[DepthLayer, ...], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    # Not a subclass's: what that does around it is not compiled (`model/layers/seam.py`).
    stream, context = DepthLayer.forward(layers[0], *args, **kwargs)
    for layer in layers[1:]:
        if args:
            args = (stream, *args[1:])
        else:
            kwargs["hidden_states"] = stream
        stream, context = DepthLayer.forward(layer, *args, **kwargs)
    return stream, context


def _groups(layers: Sequence[DepthLayer]) -> list[tuple[DepthLayer, ...]]:
    """Layers in the order of the stream that are one call each.

    Alone stays what is computed again, or is handed more than a stream by the layer before it.
    """
    together = all(type(layer) is DepthLayer and not layer.computed_again for layer in layers)
    size = GROUP if together and len(layers) >= GROUPED_FROM else 1
    return [tuple(layers[start : start + size]) for start in range(0, len(layers), size)]


Kind = tuple[torch.Size | torch.dtype, ...]
"""Shapes of what a stack of layers is called with, and the format of its input."""


def _kind(x_sbh: Tensor, beside: Iterable[object]) -> Kind:
    shapes = (value.shape for value in beside if isinstance(value, Tensor))
    return (x_sbh.shape, x_sbh.dtype, *shapes)


class Shared:
    """The compiled function of all layers of a chunk, which may be of several stacks.

    groups: layers that are one call, by the number of the first of them.
    kind: of what the chunk was called with.
    guarded: first layers that were called under all guards in a forward pass, by kind.
    again: layers that were so in a backward pass, which computes them again, by kind of their own.
    reached: the same, of all kinds together.
    passed: layers whose work the call of a layer before them has done.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, Tensor | None]],
        layers: Sequence[DepthLayer],
        *,
        guards: bool,
    ) -> None:
        self.function, self.guards = function, guards
        self.groups = {group[0].layer_number: group for group in _groups(layers)}
        self.kind: Kind = ()
        self.guarded: defaultdict[Kind, set[int]] = defaultdict(set)
        self.again: defaultdict[Kind, set[int]] = defaultdict(set)
        self.reached: set[int] = set()
        self.passed: set[int] = set()
        self.forward = False
        self.trusted = False

    def __call__(self, layer: DepthLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The layer's forward pass, or those of a group, whose other layers hand the stream on.

        Under hooks on one of a group all of it runs as it is.
        """
        number = layer.layer_number
        if number in self.passed:
            self.passed.discard(number)
            return args[0] if args else kwargs["hidden_states"], kwargs.get("context")
        group = self.groups.get(number, ())
        if not group or not all(one.runs_compiled for one in group[1:]):
            return layer.as_it_is(*args, **kwargs)
        self.passed.update(one.layer_number for one in group[1:])
        if self.guards or self.trusted:
            return self.function(group, *args, **kwargs)
        if self.forward:
            self.guarded[self.kind].add(number)
            return self.function(group, *args, **kwargs)
        return self._again(group, *args, **kwargs)

    def _again(
        self, group: tuple[DepthLayer, ...], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The forward pass in a backward pass, where no stack is called that could skip guards."""
        x_sbh, *beside = (*args, *kwargs.values())
        known, number = self.again[_kind(x_sbh, beside)], group[0].layer_number
        trusted = number in known and len(self.reached) == len(self.groups)
        known.add(number)
        self.reached.add(number)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=trusted):
            return self.function(group, *args, **kwargs)


def _without_guards(stack: TransformerBlock, shared: Shared) -> None:
    """Has the forward pass of a stack (Megatron-core's block) skip the guards.

    It does so where each of its layers has passed them with such an input.
    Guards that tell two compilations apart still run.
    """
    forward = stack.forward

    @functools.wraps(forward)
    def run(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        x_sbh: Tensor = (
            hidden_states if stack.pre_process else stack.input_tensor
        )  # as the block itself chooses
        shared.kind = _kind(x_sbh, kwargs.values())
        # Where the input has no gradient, the first layer is another compilation than the rest.
        shared.trusted = x_sbh.requires_grad and len(shared.guarded[shared.kind]) == len(shared.groups)
        shared.forward = True
        try:
            with torch.compiler.set_stance(skip_guard_eval_unsafe=shared.trusted):
                return forward(hidden_states, *args, **kwargs)
        finally:
            shared.trusted = shared.forward = False
            shared.passed.clear()

    stack.forward = run


def share_numbers(layers: Sequence[DepthLayer]) -> None:
    """Gives layers the numbers in which they differ as scalars in tensors.

    One compiled function takes these from all of them.
    A number would be compiled in, and each layer by itself.
    Numbers stay beside them: uncompiled passes read those.
    """
    numbers: defaultdict[str, list[tuple[object, str, float]]] = defaultdict(list)
    for layer in layers:
        for place, owner, name, value in layer.numbers():
            numbers[place].append((owner, name, value))
    for owners in numbers.values():
        if len({value for _, _, value in owners}) > 1:
            for owner, name, value in owners:
                setattr(owner, name, torch.tensor(value, dtype=torch.float64))


def check_compiler(option: str, without: str) -> None:
    """Raises UserError on a CPU without a C++ compiler. without: what does not need one."""
    if not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
        raise UserError(
            f"{option} needs a C++ compiler on a machine without GPUs: "
            f"install g++ (apt-get install g++) or set {without}"
        )


def allow_kinds() -> None:
    """Has one function compiled for as many kinds of layers as a model may have."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, LAYER_KINDS)


def compile_layers(
    chunks: Iterable[MegatronModule], *, backend: str | Callable[..., object] = "inductor"
) -> int:
    """Compiles the layers of these model chunks together; returns their number.

    They run compiled in training steps. In evaluation and under hooks, which a compiled layer
    would not call, they run as they were.
    backend: torch.compile's.
    Raises UserError on a CPU without a C++ compiler.
    """
    chunks = list(chunks)
    layers: list[DepthLayer] = [layer for chunk in chunks for layer in chunk.decoder.layers]
    if backend == "inductor":
        check_compiler("train.compile=true", "train.compile=false")
    allow_kinds()
    function = torch.compile(_forward, fullgraph=True, dynamic=False, backend=backend)
    share_numbers(layers)
    guards = os.environ.get("FATHOM_GUARDS") == "1"
    for stack in (chunk.decoder for chunk in chunks):
        shared = Shared(function, list(stack.layers), guards=guards)
        for layer in stack.layers:
            layer.compiled = shared
        if not guards:
            _without_guards(stack, shared)
    return len(layers)


def compile_joins(
    chunks: Iterable[MegatronModule], *, backend: str | Callable[..., object] = "inductor"
) -> int:
    """Compiles the residual joins of layers whose other parts are kernels already.

    Scales, bias and additions become one pass over memory.
    Returns the number of joins that had more than one operation; the others stay as they are,
    and with none nothing is compiled.
    Raises ValueError for more sets of coefficients than PyTorch compiles one function for.
    """
    chunks = list(chunks)
    joins = [
        part
        for chunk in chunks
        for part in chunk.modules()
        if isinstance(part, ResidualJoin) and part.kernels > 1
    ]
    kinds = {(part.residual_scale, part.branch_scale, part.skip_scale) for part in joins}
    # Where layers are computed again, forward passes have no gradients: another compilation.
    again = any(chunk.config.recompute_granularity == "full" for chunk in chunks)
    if len(kinds) * (1 + again) >= RECOMPILES:
        raise ValueError(f"{len(kinds)} sets of residual coefficients: each would be compiled by itself")
    function = torch.compile(join, fullgraph=True, dynamic=False, backend=backend)
    for part in joins:
        part.function = function
    return len(joins)
