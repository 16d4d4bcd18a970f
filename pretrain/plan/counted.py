"""Operators of one layer of a model, built as in a run and passed forward and backward.

Its tensors have no memory, so that the largest layer is counted in milliseconds, by PyTorch's
kernels for GPUs (`model.cost.operators.GpuKernels`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.cost.operators import OWN, PARTIAL, Counting, GpuKernels, Kept, Operator, Phase, backward
from model.depth.folded import FoldedSublayer
from model.depth.placed import PlacedLayer
from model.depth.schemes import SCHEMES
from model.families.family import Stack
from parallel.config import RecomputeConfig
from parallel.launch.pretended import pretended_ranks

if TYPE_CHECKING:
    from model.layers.layer import DepthLayer

BESIDE = ("products", "attention", "messages")
"""Kinds of operators whose time is not that of the bytes they move."""
OWN_HOST = 4
"""Operators of PyTorch whose host time one of them takes.

Derived: three with the kernel left out, on a CPU (`python -m benchmarks.host`); a launch by Triton
from Python was not measured and counts as one.
"""


@dataclass(frozen=True)
class Way:
    """How the layers of a run are computed, as far as their operators depend on it."""

    seq_length: int
    source_length: int | None = None
    """Tokens that an encoder under a decoder reads."""
    samples: int = 1
    element: int = 2
    """Bytes of a weight and of an activation, 2 or 4."""
    fp32_stream: bool = False
    selective: bool = False
    """Attention's core is computed again."""
    documents: bool = False
    """Documents of a sample do not see each other."""
    tensor: int = 1
    """Tensor-parallel size."""
    sequence_parallel: bool = False
    joined: bool = False
    """`train.kernels: local_joined`."""
    alone: bool = False
    """Layers are computed again each by itself: no pass reaches from one into the next."""
    fused_sums: bool = False
    """Gradients of weights are added to their sums in the product."""
    fused_residual: bool = False
    """The last products of branches add onto the residual."""
    fused_activation: bool = False
    """Activations are inside of the products beside them."""
    device: str = "meta"
    """Or cpu, where tensors have memory and the kernels are a CPU's."""


@dataclass(frozen=True)
class CountedLayer:
    """What a layer's pass forward and backward did, and its gradients' way into their sums."""

    operators: tuple[Operator, ...]
    kept: int
    """Bytes that autograd kept of it for its backward pass, beside parameters."""
    parameters: int

    def host(self, phase: Phase) -> int:
        """Operators that the host starts a kernel for."""
        return sum(one.phase == phase for one in self.operators)

    def host_time(self, phase: Phase) -> int:
        """What the host takes for them, in operators of PyTorch."""
        own = sum(one.phase == phase and one.kind in OWN for one in self.operators)
        return self.host(phase) + (OWN_HOST - 1) * own

    def moved(self, phase: Phase, without: Sequence[str] = BESIDE) -> int:
        """Bytes that operators read and write, but those of some kinds: element-wise ones."""
        return sum(one.moved for one in self.operators if one.phase == phase and one.kind not in without)

    @property
    def fixed(self) -> int:
        """Bytes of partial sums of gradients, of which a larger batch has no more."""
        return sum(one.moved for one in self.operators if one.kind == PARTIAL)


def count_layer(config: ModelConfig, place: PlacedLayer, way: Way) -> CountedLayer:
    """Counts one layer of a model.

    config: of the whole model.
    With joined kernels the first norm is part of the layer before, and that of the next layer of
    this one, which then has its gradients in this one's place.
    Raises RuntimeError as `pretended_ranks`.
    """
    meta = way.device == "meta"
    draws = bool(config.hidden_dropout or config.attention_dropout or way.selective)
    with pretended_ranks(way.tensor, draws=draws), _own_linear(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-core's remarks on settings of a run
        layer = _build(config, place, way)
        whole = _pass_at_once(config, place, way, layer) if way.joined else layer
        parameters = list(whole.parameters())
        stream, beside = _inputs(config, place, way)
        _feed(layer, stream)
        sums = _sums(parameters, way)
        _fuse(layer, whole, way)
        counting = Counting(way.device, sums)
        kernels = GpuKernels() if meta else contextlib.nullcontext()
        # The stream that enters counts as kept, for it is another layer's result.
        kept = Kept([*parameters, *_shared(beside)])
        with kernels, counting:
            with kept:
                out, _ = layer(stream, **beside)
            outs = [out, *_beside_stream(layer)]
            gradients = [torch.empty_like(one) for one in outs]
            counting.phase = "backward"
            backward(outs, gradients)
        own = sum(map(torch.numel, layer.parameters()))
        return CountedLayer(tuple(counting.operators), kept.bytes, own)


def _reach_on(config: ModelConfig, way: Way) -> bool:
    """Whether passes reach from one layer into the next."""
    return way.joined and not way.alone and not config.blueprint.crossed


def _beside(config: ModelConfig, place: PlacedLayer, way: Way) -> list[PlacedLayer]:
    """The layers that a layer shares passes with: the one before and the one after it."""
    if not _reach_on(config, way):
        return []
    return [one for one in config.placed_layers() if abs(one.number - place.number) == 1]


class _Stack(nn.Module):
    """Some layers as `pass_at_once` knows a chunk of a model."""

    def __init__(self, layers: list[DepthLayer], final_norm: nn.Module | None) -> None:
        super().__init__()
        self.config = layers[0].config
        self.layers, self.final_layernorm = nn.ModuleList(layers), final_norm

    @property
    def decoder(self) -> _Stack:
        return self


def _pass_at_once(config: ModelConfig, place: PlacedLayer, way: Way, layer: DepthLayer) -> _Stack:
    """Has the element-wise work of a layer computed by our kernels, between those beside it."""
    from model.layers.one_pass import pass_at_once
    from model.layers.torch_parts import Norm

    layers, final = [layer], None
    for one in _beside(config, place, way):
        layers.insert(0 if one.number < place.number else 2, _build(config, one, way))
    last = place.number + 1 == config.total_layers and not way.alone
    if last and SCHEMES[config.scheme].final_norm:
        with torch.device(way.device):
            final = Norm(layer.config, config.hidden_size).to(_format(way))
    stack = _Stack(layers, final)
    pass_at_once([stack], "triton")
    return stack


def _feed(layer: DepthLayer, stream: Tensor) -> None:
    """Gives a layer what the layer before has computed for it beside its stream."""
    name, _, _, norm, _ = next(layer.parts())
    fork, fed = layer.forks.get(name), getattr(norm, "fed", None)

    def made(dtype: torch.dtype | None) -> Tensor:
        return torch.zeros_like(stream, dtype=dtype, requires_grad=True)

    if fed is not None:
        dtype = fed.numbers.narrow
        fed.ready = (stream, made(dtype), True, None if fork is None else made(dtype))
    elif fork is not None:
        fork.again = (stream, made(None))


def _beside_stream(layer: DepthLayer) -> list[Tensor]:
    """What a layer has computed for the next one beside its stream."""
    last = layer.joins()[-1].follower
    if last is None:
        return []
    given: list[Tensor | None] = [] if last.ready is None else [last.ready[1], last.ready[3]]
    given += [] if last.again is None else [last.again[1]]
    return [one for one in given if one is not None]


@contextlib.contextmanager
def _own_linear() -> Iterator[None]:
    """PyTorch's product with a bias. DeepSpeed's ZeRO-3 puts another in its place, for good."""
    found = F.linear
    F.linear = torch._C._nn.linear  # type: ignore[assignment]
    try:
        yield
    finally:
        F.linear = found  # type: ignore[assignment]


def _format(way: Way) -> torch.dtype:
    return torch.bfloat16 if way.element == 2 else torch.float32


def _build(config: ModelConfig, place: PlacedLayer, way: Way) -> DepthLayer:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from model.layers.torch_spec import local_layer_spec
    from model.layers.transformer_config import stack_config, transformer_config

    dtype = _format(way)
    core = transformer_config(
        config,
        dtype=dtype,
        init_model_with_meta_device=way.device == "meta",
        tensor_model_parallel_size=way.tensor,
        sequence_parallel=way.sequence_parallel,
        fp32_residual_connection=way.fp32_stream,
        **RecomputeConfig(granularity="selective" if way.selective else "none").core_fields(),
    )
    spec = local_layer_spec(
        place.folded,
        causal=place.stack.causal and not config.blueprint.crossed,
        cross=place.stack.cross,
        fp32_stream=way.fp32_stream,
        soft_cap=config.attention.soft_cap,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(way.device):
        layer: DepthLayer = build_module(
            spec,
            config=stack_config(core, config.of(place.stack)),
            layer_number=place.number + 1,
            pg_collection=groups,
        )
    return layer.to(dtype).train()


def _inputs(config: ModelConfig, place: PlacedLayer, way: Way) -> tuple[Tensor, dict[str, Any]]:
    """The stream [s, b, h] that enters a layer, and what it reads beside it, by name."""
    dtype = _format(way)
    crossed, below = config.blueprint.crossed, place.stack is not config.blueprint.stacks[-1]
    length = (way.source_length or 0) if below else way.seq_length
    shards = way.tensor if way.sequence_parallel else 1
    made: dict[str, Any] = {"device": way.device}

    def stream(tokens: int) -> Tensor:
        kind = torch.float32 if way.fp32_stream else dtype
        size = (tokens // shards, way.samples, config.hidden_size)
        return torch.zeros(size, dtype=kind, **made).requires_grad_()

    beside: dict[str, Any] = {"attention_mask": None}
    if crossed:
        beside["attention_mask"] = torch.zeros(way.samples, 1, length, length, dtype=torch.bool, **made)
    elif config.is_local(place.number) or way.documents:
        rows = way.samples if way.documents else 1
        beside["attention_mask"] = torch.zeros(rows, 1, length, length, dtype=dtype, **made)
    if config.position == "rotary":
        width = 2 * config.of(place.stack).rotary_width
        beside["rotary_pos_emb"] = torch.zeros(length, 1, 1, width, dtype=dtype, **made)
    if place.stack.cross:
        source = way.source_length or 0
        beside["context"] = stream(source)
        beside["context_mask"] = torch.zeros(way.samples, 1, length, source, dtype=torch.bool, **made)
    # A view, for a leaf copies a gradient that it has in common with another tensor.
    entering = stream(length)
    return entering.view_as(entering), beside


def _shared(beside: dict[str, Any]) -> Iterator[Tensor]:
    """What all layers of a stack read: it is kept once for all of them."""
    return (tensor for tensor in beside.values() if tensor is not None)


def _sums(parameters: list[nn.Parameter], way: Way) -> list[Tensor]:
    """The sums that gradients are added to, as `parallel.engine.gradients` has them."""
    from parallel.engine.gradients import accumulates

    sums = [torch.zeros(one.shape, dtype=torch.float32, device=way.device) for one in parameters]
    for parameter, total in zip(parameters, sums, strict=True):
        accumulates(parameter, total)
    return sums


def _fuse(layer: nn.Module, whole: nn.Module, way: Way) -> None:
    """whole: the layer and what its passes reach."""
    from model.layers.activated import activate_in_products
    from model.layers.product_pass import feed_pass
    from model.layers.products import add_in_products, sum_in_products

    if way.fused_sums:
        sum_in_products([whole])
    if way.fused_residual:
        add_in_products([layer])
    if way.fused_activation:
        activate_in_products([layer], feed_pass)


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs a rank and micro-batch beside products and attention; a stack's average.

    Bytes are of one sample on one rank: what every tensor-parallel rank moves of a stream that is
    not cut, and what all of them move together of the heads and hidden features that they share.
    """

    forward: float
    """What the host takes to start operators, in those of PyTorch."""
    backward: float
    accumulate: float
    forward_stream: float
    """Bytes."""
    forward_shared: float
    backward_stream: float
    backward_shared: float
    accumulated: float
    """Bytes that adding a gradient to its sum moves, per parameter."""
    fixed: float = 0.0
    """Bytes of a micro-batch of any size."""

    def operators(self, passes: float = 1.0) -> float:
        """Of PyTorch, whose host time one micro-batch takes. passes: forward ones."""
        return passes * self.forward + self.backward + self.accumulate

    def moved(self, samples: int, tensor: int, *, sequence_parallel: bool, passes: float = 1.0) -> float:
        """Bytes of one rank and micro-batch."""
        stream = passes * self.forward_stream + self.backward_stream
        shared = passes * self.forward_shared + self.backward_shared
        return self.fixed + samples * (stream / (tensor if sequence_parallel else 1) + shared / tensor)


def layer_cost(config: ModelConfig, stack: Stack, way: Way) -> LayerCost:
    """The average over a stack's layers, of which each kind is counted once.

    way: without tensor parallelism and of one sample; both are reckoned from it.
    """
    return _layer_cost(config.model_dump_json(), stack.name, way)


@functools.lru_cache(maxsize=256)
def _layer_cost(config_json: str, stack: str, way: Way) -> LayerCost:
    config = ModelConfig.model_validate_json(config_json)
    found = [places for places in _by_kind(config, way) if places[0].stack.name == stack]
    costs = [(_cost(config, places[0], way), len(places)) for places in found]
    return LayerCost(
        *(
            math.fsum(getattr(cost, one.name) * count for cost, count in costs) / sum(map(len, found))
            for one in fields(LayerCost)
        )
    )


def _cost(config: ModelConfig, place: PlacedLayer, way: Way) -> LayerCost:
    plain = count_layer(config, place, way)
    wider = count_layer(_doubled(config, place.stack), place, way)
    phases: tuple[Phase, ...] = ("forward", "backward")
    beside = (*BESIDE, PARTIAL)
    moved = {phase: plain.moved(phase, beside) for phase in phases}
    shared = {phase: wider.moved(phase, beside) - moved[phase] for phase in phases}
    added = plain.moved("accumulate", beside) / plain.parameters
    return LayerCost(
        plain.host_time("forward"),
        plain.host_time("backward"),
        plain.host_time("accumulate"),
        (moved["forward"] - shared["forward"]) / way.samples,
        shared["forward"] / way.samples,
        (moved["backward"] - shared["backward"]) / way.samples,
        shared["backward"] / way.samples,
        added,
        plain.fixed,
    )


def _doubled(config: ModelConfig, stack: Stack) -> ModelConfig:
    """A model with twice what tensor-parallel ranks share in a stack: heads and hidden features."""
    own = config.of(stack)
    double = {"num_attention_heads": 2 * own.num_attention_heads, "ffn_hidden_size": 2 * own.ffn_size}
    beside = {"encoder_attention_heads": None, "encoder_ffn_hidden_size": None}
    groups = {"num_query_groups": 2 * own.groups, "head_dim": own.kv_channels}
    return config.model_copy(update=double | beside | groups)


def _kind(config: ModelConfig, place: PlacedLayer) -> tuple[object, ...]:
    """What decides which operators a layer has: of the numbers of its plan, which are 0 or 1."""

    def form(part: FoldedSublayer) -> FoldedSublayer:
        plain: dict[str, Any] = {one.name: _sign(getattr(part, one.name)) for one in fields(part)}
        return replace(part, **plain | {"entering": 1.0, "joined": 1.0})

    plan = place.folded
    return (form(plan.attention), form(plan.cross), form(plan.mlp), plan.gate, config.is_local(place.number))


def _by_kind(config: ModelConfig, way: Way) -> list[list[PlacedLayer]]:
    """Layers that have the same operators, in the order in which each kind first appears.

    The layers beside one decide too where passes reach from one into the next.
    """
    places = config.placed_layers()
    own = {place.number: _kind(config, place) for place in places}
    near = (-1, 0, 1) if _reach_on(config, way) else (0,)
    found: dict[tuple[object, ...], list[PlacedLayer]] = {}
    for place in places:
        kinds = (own.get(place.number + step) for step in near)
        found.setdefault((place.stack.name, *kinds), []).append(place)
    return list(found.values())


def _sign(value: float | bool) -> float | bool:
    return value if isinstance(value, bool) or value in (0.0, 1.0) else 2.0


@dataclass(frozen=True)
class LayerKind:
    """Layers of a model that have the same operators."""

    stack: str
    layers: tuple[int, ...]
    """Their numbers, from 1 in the whole model."""
    counted: CountedLayer


def layer_kinds(config: ModelConfig, way: Way) -> list[LayerKind]:
    """Every kind of layer of a model, in the order in which each first appears."""
    return [
        LayerKind(
            places[0].stack.name,
            tuple(place.number + 1 for place in places),
            count_layer(config, places[0], way),
        )
        for places in _by_kind(config, way)
    ]
