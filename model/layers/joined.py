"""A residual join and the norm after it in one pass over memory, forward and backward.

Apart they are an addition and a norm, with a third pass for a bias, a second addition, a factor or
dropout. The norm stands in the layer of the join or in the next one. It is handed what the join
computed for it: no caller sees a difference.

Hooks hear what they would hear else: under hooks on the join, on its layer or on the layer of the
norm, both run apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.depth.folded import FoldedSublayer
from model.layers.layer import DepthLayer
from model.layers.residual import ResidualJoin, StreamGate, gated, join
from model.layers.torch_parts import Norm, RowLinear, norm_by_parts

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

Number = float | Tensor
"""Tensors are scalars on the CPU, for compiled code that joins with other numbers share."""


class Numbers(NamedTuple):
    """What a join and the norm after it multiply by."""

    residual_scale: float
    branch_scale: Number
    skip_scale: float
    eps: Number = 0.0
    """Of the norm."""
    out_scale: Number = 1.0
    """On what the norm gives."""
    dropout: float = 0.0
    """Share of the branch's elements that are dropped."""
    centred: bool = False
    """The norm is a LayerNorm, else an RMSNorm."""
    narrow: torch.dtype | None = None
    """Format of what the norm gives; None: the stream's."""
    forked: bool = False
    """What the norm gives is read as a branch's input and as the stream."""


class After(NamedTuple):
    """Parameters of what follows a join in its pass, in this order."""

    weight: Tensor | None = None
    """[h], of the norm; None where there is no norm."""
    shift: Tensor | None = None
    """[h], of a LayerNorm."""
    gate: Tensor | None = None
    """[1], of `model.layers.residual.StreamGate`."""


def joined(
    residual: Tensor | None,
    branch: Tensor,
    bias: Tensor | None,
    layer_input: Tensor | None,
    share: Tensor | None,
    after: After,
    numbers: Numbers,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(the new stream, out_scale times the stream normed, that again), [s, b, h] each.

    The last is None, or for the first of two readers, whose gradients are then added in the pass.
    residual, branch, bias, layer_input, share: as those of `model.layers.residual.join`.
    """
    if numbers.dropout:
        branch, bias = F.dropout(branch if bias is None else branch + bias, numbers.dropout), None
    stream = join(
        residual,
        branch,
        bias,
        layer_input,
        numbers.residual_scale,
        numbers.branch_scale,
        numbers.skip_scale,
        share,
    )
    if after.gate is not None:
        stream = gated(stream, after.gate)
    if after.weight is None:
        return stream, None, None
    normed = norm_by_parts(stream, after.weight, after.shift, numbers.eps) * numbers.out_scale
    return stream, normed.to(numbers.narrow or stream.dtype), None


Joined = Callable[..., tuple[Tensor, "Tensor | None", "Tensor | None"]]
"""Takes and gives what `joined` does."""


class Follower:
    """What follows a join in the same pass: a norm, which gets its result from here, and a gate.

    norm: None where none follows in this part of the model.
    gate: of the stream before the norm, None where there is none.
    heard: hooks under which both run apart.
    narrow: what the norm gives is for a branch alone, in the format of the weights.
    scale: a factor on what the norm gives.
    """

    def __init__(
        self,
        part: ResidualJoin,
        norm: Norm | None,
        heard: Sequence[Mapping[int, object]],
        *,
        gate: StreamGate | None = None,
        narrow: bool = False,
        scale: float = 1.0,
    ) -> None:
        self.norm, self.gate, self.scale = norm, gate, scale
        self.heard = [*heard, gate._forward_hooks] if gate is not None else heard
        self.function: Joined = joined
        self.numbers = Numbers(part.residual_scale, part.branch_scale, part.skip_scale, dropout=part.dropout)
        if norm is not None:
            self.numbers = self.numbers._replace(
                eps=norm.eps,
                out_scale=scale,
                centred=norm.bias is not None,
                narrow=norm.weight.dtype if narrow else None,
            )
        self.ready: tuple[Tensor, Tensor, bool, Tensor | None] | None = None
        """A stream, that stream normed, whether a gradient is recorded, and the second again."""
        self.again: tuple[Tensor, Tensor] | None = None
        """What the norm gave last, and that again."""

    @property
    def alone(self) -> bool:
        """Whether nobody listens to the parts of a pass of now."""
        return not any(self.heard)

    def __call__(
        self,
        residual: Tensor | None,
        branch: Tensor,
        bias: Tensor | None,
        layer_input: Tensor | None,
        share: Tensor | None,
    ) -> Tensor:
        """The new stream [s, b, h]; keeps it normed for `normed`. Arguments as `join`."""
        weight, shift = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        after = After(weight, shift, None if self.gate is None else self.gate.gate)
        stream, normed, again = self.function(residual, branch, bias, layer_input, share, after, self.numbers)
        if self.gate is not None:
            self.gate.passed = True
        self.ready = None if normed is None else (stream, normed, torch.is_grad_enabled(), again)
        return stream

    def normed(self, x: Tensor) -> Tensor:
        """What the norm gives of x [s, b, h], once: nothing is kept alive here.

        It computes that itself where x is not what the join gave last.
        """
        ready, self.ready = self.ready, None
        if ready is not None and ready[0] is x and ready[2] == torch.is_grad_enabled():
            self.again = None if ready[3] is None else (ready[1], ready[3])
            return ready[1]
        assert self.norm is not None
        normed = self.norm.apart(x if self.numbers.narrow is None else x.to(self.numbers.narrow))
        return normed if self.scale == 1.0 else normed * self.scale

    def branch_input(self, normed: Tensor) -> Tensor:
        """What a branch reads of the norm's result, once, with a gradient of its own if it can."""
        last, self.again = self.again, None
        return normed if last is None or last[0] is not normed else last[1]


def _followers(
    stack: Any, config: TransformerConfig
) -> Iterator[tuple[ResidualJoin, Follower, RowLinear | None]]:
    """The joins of a stack (Megatron-core's block), each with what can follow in its pass.

    And with the linear layer before it, where that can leave its bias to the join.

    Passes do not reach out of what is recomputed together, nor from layer to layer where layers of
    two stacks take turns.
    """
    full = config.recompute_granularity == "full"
    group = config.recompute_num_layers if full else len(stack.layers)
    layers: list[DepthLayer] = list(stack.layers)
    for place, layer in enumerate(layers):
        parts = list(layer.parts())
        ends = place + 1 == len(layers) or (place + 1) % group == 0
        after = [(layer, name, plan, norm) for name, plan, _, norm, _ in parts[1:]]
        if not ends and type(layer) is type(layers[place + 1]) is DepthLayer:
            name, plan, _, norm, _ = next(layers[place + 1].parts())
            after.append((layers[place + 1], name, plan, norm))
        gate = layer.gpas if layer.gated else None
        for index, (name, plan, part, _, norm_out) in enumerate(parts):
            heard = [part._forward_hooks, layer._forward_hooks]
            if plan.norm_out:
                follower = Follower(part, norm_out if type(norm_out) is Norm else None, heard, gate=gate)
                if index < len(after) and not after[index][2].norm_in:
                    _fork(follower, *after[index][:2])
            elif index < len(after):
                follower = _before(part, after[index], heard, gate)
            else:
                last = stack.final_layernorm if layer is layers[-1] and not full else None
                follower = Follower(part, last if type(last) is Norm else None, heard, gate=gate)
            yield part, follower, _linear(layer, name)


def _linear(layer: DepthLayer, name: str) -> RowLinear | None:
    """The last linear layer of a branch, if what it gives enters the join as it is."""
    last, plan = layer.last_linear(name), getattr(layer.plan, name)
    return last if isinstance(last, RowLinear) and not plan.norm_branch else None


def _fork(follower: Follower, reader: DepthLayer, name: str) -> None:
    """Has the branch of a layer's sublayer read what the norm gives by `Follower.branch_input`."""
    follower.numbers = follower.numbers._replace(forked=follower.norm is not None)
    reader.forks[name] = follower


def _before(
    part: ResidualJoin,
    after: tuple[DepthLayer, str, FoldedSublayer, object],
    heard: Sequence[Mapping[int, object]],
    gate: StreamGate | None,
) -> Follower:
    """A join, its gate, and the norm before the branch of the sublayer `after` of a layer."""
    reader, name, plan, norm = after
    if not plan.norm_in or type(norm) is not Norm:
        return Follower(part, None, heard, gate=gate)
    # Where the residual is the norm's result too, only its copy for the branch has another format.
    alone = not plan.residual_from_norm
    follower = Follower(
        part,
        norm,
        [*heard, reader._forward_pre_hooks],
        gate=gate,
        narrow=alone and reader.fp32_stream,
        scale=plan.input_scale if alone else 1.0,
    )
    if not alone:
        _fork(follower, reader, name)
    return follower


def _share_numbers(followers: Sequence[Follower]) -> None:
    """Puts numbers that differ from join to join into tensors: one compilation takes them all."""
    for field in ("branch_scale", "eps", "out_scale"):
        if len({getattr(one.numbers, field) for one in followers if one.norm is not None}) > 1:
            for one in followers:
                changed: dict[str, Any] = {
                    field: torch.tensor(getattr(one.numbers, field), dtype=torch.float64)
                }
                one.numbers = one.numbers._replace(**changed)


def join_norms(chunks: Iterable[MegatronModule], function: Joined, *, compiled: bool = False) -> int:
    """Has residual joins of these model chunks and the norms after them computed in one pass.

    It adds the bias of the product before the join too, and sums its gradient.
    function: what computes a pass. compiled: it is, for each value of the numbers once.
    A gate of the stream is in the same pass.
    Returns the number of such joins. Left as they are: joins of one operation without a norm or a
    gate after them in the same part of the model, as at the end of a stage.
    It is so in training; evaluation has both apart.
    """
    pairs = []
    for stack in (chunk.decoder for chunk in chunks):
        config = stack.config
        biased = config.tensor_model_parallel_size > 1 and config.add_bias_linear
        pairs += [
            (part, follower, linear)
            for part, follower, linear in _followers(stack, config)
            if follower.norm is not None
            or follower.gate is not None
            or part.kernels > 1
            or part.dropout
            or biased
        ]
    if compiled:
        _share_numbers([follower for _, follower, _ in pairs])
    for part, follower, linear in pairs:
        follower.function = function
        part.follower = follower
        if linear is not None:
            linear.leaves_bias = True
        if follower.norm is not None:
            follower.norm.fed = follower
    return len(pairs)
