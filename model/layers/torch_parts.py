"""Parts of the layer without Transformer Engine: norms, linear layers and attention.

They are for CPUs, and for GPUs where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.layers.products import product
from model.layers.regions import product_of_columns, product_of_rows
from model.layers.transformer_config import Activation
from model.layers.windows import has_window, own_mask, own_table
from model.norms import NORMS

if TYPE_CHECKING:
    from model.layers.joined import Follower
    from model.layers.normed import NormedActivation

COPIED_FROM = 192
"""Positions from which the CPU's attention kernel is quicker on heads that lie in one piece.

The time of the copies is included. The kernel reads a head position by position,
and in [s, b, h] each position is on another page.
Costs the memory of one more stream [s, b, h] a layer.
"""


Kernel = Callable[[Tensor, tuple[int, ...], Tensor, "Tensor | None", float], Tensor]
KERNELS: dict[str, Kernel] = {
    "LayerNorm": F.layer_norm,
    "RMSNorm": lambda x, shape, weight, bias, eps: F.rms_norm(x, shape, weight, eps),
}
"""PyTorch's kernel of each kind of norm.

Of x [..., h], (h,), gain [h], bias [h] or None, epsilon.
"""


class Norm(nn.Module):
    """A norm over the last dimension, of the kind `config.normalization` (`model/norms.py`).

    Parameters carry `sequence_parallel`, which marks those whose gradients are partial sums over
    the tensor-parallel group when the stream is sharded along the sequence.
    """

    fed: Follower | NormedActivation | None = None
    """What has its result from the join, or the activation, before it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.shared_eps: Tensor | None = None
        """The same number for compiled code that layers with other numbers share."""
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        if config.normalization not in KERNELS:
            raise ValueError(
                f"{config.normalization} has no kernel in KERNELS of model/layers/torch_parts.py"
            )
        self.kernel = KERNELS[config.normalization]
        kind = next(kind for kind in NORMS.values() if kind.core == config.normalization)
        zeros = torch.zeros(hidden_size, dtype=config.params_dtype)
        self.bias = nn.Parameter(zeros) if "bias" in kind.leaves else None
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> the same shape and format.

        An fp32 stream is normed in fp32, whatever the format of the weights.
        """
        return self.apart(x) if self.fed is None else self.fed.normed(x)

    def apart(self, x: Tensor) -> Tensor:
        """As `forward`, by a kernel of its own."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if x.dtype != weight.dtype:
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if torch.compiler.is_compiling() and self.shared_eps is not None:
            return norm_by_parts(x, weight, bias, self.shared_eps)
        return self.kernel(x, self.shape, weight, bias, self.eps)


def norm_by_parts(x: Tensor, weight: Tensor, bias: Tensor | None, eps: Tensor | float) -> Tensor:
    """LayerNorm, or RMSNorm where bias is None, of x [..., h] with an epsilon that may be a tensor.

    PyTorch's own norms take numbers only.
    For compiled code, in which it is one kernel as they are. Computed in at least fp32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is None:
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight).to(x.dtype)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(variance + eps) * weight + bias).to(x.dtype)


class ColumnLinear(ColumnParallelLinear):
    """Column-parallel linear layer that is a plain one where nothing is parallel.

    There it has no autograd function of Megatron's.
    adds_bias: False where the caller adds it, in compiled code,
        in the element-wise kernel that follows anyway.
    leaves_bias: as `RowLinear`.
    lends_bias: in training the bias is added here, and the caller has its gradient.
    """

    adds_bias = True
    leaves_bias = False
    lends_bias = False
    fuse_wgrad_accumulation = False
    """The weight's gradient is added to its sum in the product (`model/layers/products.py`)."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_: [s, b, in] -> ([s, b, out / TP], bias if it is left to the caller)."""
        compiled = torch.compiler.is_compiling()
        if self.tp_group.size() > 1 and not compiled:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.tp_group.size() > 1:
            return product_of_rows(input_, weight, self.tp_group, cut=self.sequence_parallel), self.bias
        used, left = self.bias, None
        if (compiled and not self.adds_bias) or (self.leaves_bias and self.training):
            used, left = None, self.bias
        elif self.lends_bias and self.training and self.bias is not None:
            used, left = self.bias.detach(), self.bias
        if self.fuse_wgrad_accumulation:
            total: Tensor = weight.main_grad  # type: ignore[union-attr]
            return product(input_, weight, used, total=total), left
        return F.linear(input_, weight, used), left


class RowLinear(RowParallelLinear):
    """Row-parallel linear layer.

    Without tensor parallelism the bias goes into the matrix product instead of to the caller.
    leaves_bias: in training the caller adds it, in a pass that sums its gradient too.
    """

    leaves_bias = False
    fuse_wgrad_accumulation = False
    """As that of `ColumnLinear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_norm: nn.Module | None = None
        """Of what enters, where the layer has set one."""
        self.onto: tuple[Tensor, float] | None = None
        """What the next product is added to [s, b, out], and a factor on the product."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """input_: [s, b, in / TP] -> ([s, b, out], bias if it is left to the caller)."""
        if self.input_norm is not None:
            input_ = self.input_norm(input_)
        compiled = torch.compiler.is_compiling()  # every caller takes the bias of these
        if self.tp_group.size() > 1 and not compiled:
            return super().forward(input_)
        if self.tp_group.size() > 1:
            cut = self.sequence_parallel
            return product_of_columns(input_, self.weight, self.tp_group, cut=cut), self.bias
        total = self.weight.main_grad if self.fuse_wgrad_accumulation else None
        if self.onto is not None:
            (residual, factor), self.onto = self.onto, None
            return product(input_, self.weight, None, residual, factor, total), None
        apart = compiled or (self.leaves_bias and self.training)
        used, left = (None, self.bias) if apart else (self.bias, None)
        if total is not None:
            return product(input_, self.weight, used, total=total), left
        return F.linear(input_, self.weight, used), left


class SdpaAttention(MegatronModule):
    """Core attention over torch's scaled_dot_product_attention.

    It has that function's flash and memory-efficient kernels where they exist.
    Stands where Megatron-core's unfused DotProductAttention would.
    Raises ValueError for context parallelism, for which `model/layers/context.py` has others.
    """

    gathers = False
    """Whether it attends over sequences that are cut over ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1 and not self.gathers:
            raise ValueError(f"{type(self).__name__} does not attend over a sequence that is cut")
        self.windowed = has_window(config, layer_number)
        self.causal = attn_mask_type == AttnMaskType.causal and not self.windowed
        self.dropout = config.attention_dropout
        self.scaled = {} if config.softmax_scale is None else {"scale": config.softmax_scale}
        # Inside a sequence-parallel block the model-parallel random stream is already in force.
        self.fork_rng = bool(config.attention_dropout) and not config.sequence_parallel

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        """Returns [s, b, heads d].

        query: [s, b, heads, d]; key, value: [t, b, groups, d].
        attention_mask: broadcastable to [b, heads, s, t], True hides, or a number added to scores:
        all that is hidden, also by a causal mask. None: the layer's own kind of mask.
        Raises ValueError for none where there is a window, which only a mask tells.
        """
        if self.windowed and attention_mask is None:
            raise ValueError("attention with a window needs its mask")
        mask = attention_mask
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask.to(query.dtype)
        dropout = self.dropout if self.training else 0.0
        copied = query.shape[0] >= COPIED_FROM and query.is_cpu
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if copied:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        # Compiled code draws from the stream in force. Where ranks need two, a run is refused.
        if dropout and self.fork_rng and not torch.compiler.is_compiling():
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out_bhsd = self.attend(q, k, v, mask, dropout)
        else:
            out_bhsd = self.attend(q, k, v, mask, dropout)
        return out_bhsd.permute(2, 0, 1, 3).flatten(2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Returns [b, heads, s, d].

        query: [b, heads, s, d]; key, value: [b, groups, t, d].
        mask: True where a key is seen, or added to scores; None: the layer's own kind of mask.
        """
        grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        causal = self.causal and mask is None
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, causal, **grouped, **self.scaled
        )


def computed_again(attend: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """attend(*args); the backward pass computes what it needs again, with the same masks."""
    if torch.compiler.is_compiling():
        again: Tensor = checkpoint(attend, *args, use_reentrant=False)
    else:
        again = tensor_parallel.checkpoint(attend, False, *args)
    return again


def rotary_table(angles: Tensor, dtype: torch.dtype, magnitude: float = 1.0) -> Tensor:
    """Cosines, then sines, of rotary angles [s, 1, 1, d], as one tensor [s, 1, 1, 2 d].

    Its format is that of the activations. magnitude: a factor on all of them.
    The first half of the sines is negative, so that `rotate` need not negate anything.
    Made once a micro-batch: in every layer it would cost four launches and two tensors kept for
    backward.
    """
    sines = angles.sin()
    half = sines.shape[-1] // 2
    table = torch.cat((angles.cos(), -sines[..., :half], sines[..., half:]), dim=-1)
    return (table if magnitude == 1 else table * magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form (Su et al. 2021 as in Llama).

    x: [..., d]; cos, sin: of a `rotary_table`, broadcastable to x, or narrower where only the first
    entries turn.
    """
    rest = x[..., cos.shape[-1] :]
    if rest.shape[-1]:
        x = x[..., : cos.shape[-1]]
    first, second = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class Heads(NamedTuple):
    """Heads of a product whose columns are those of one group after another."""

    groups: int
    share: int
    """Query heads of a group, before its key and its value."""
    width: int


Separated = Callable[[Tensor, "Tensor | None", "Tensor | None", Heads], tuple[Tensor, Tensor, Tensor]]
"""Takes and gives what `separated` does."""


def views_of(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [s, b, heads, d], keys and values [s, b, groups, d] of a product [s, b, all of them].

    Queries are a copy where no view has such a shape.
    """
    groups, share, width = heads
    qkv = qkv.view(*qkv.shape[:2], groups, (share + 2) * width)
    query, key, value = torch.split(qkv, [share * width, width, width], dim=-1)
    return query.reshape(*query.shape[:2], groups * share, width), key, value


def turned(query: Tensor, key: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both [s, b, .., d] by a `rotary_table`, or as they are without one."""
    if table is None:
        return query, key
    cos, sin = table.chunk(2, dim=-1)
    return rotate(query, cos, sin), rotate(key, cos, sin)


def separated(
    qkv: Tensor, bias: Tensor | None, table: Tensor | None, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, turned by a `rotary_table` or not, and values, as `views_of` gives them.

    qkv: the product [s, b, columns]; bias: [columns], None where the product has it.
    """
    query, key, value = views_of(qkv if bias is None else qkv + bias, heads)
    return *turned(query, key, table), value


class LocalSelfAttention(SelfAttention):
    """Megatron-core's self-attention with a forward for training only.

    It has the same parameters and layout, and takes less host time per layer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_qkv.adds_bias = False
        self.v_layernorm: nn.Module | None = None
        """As Megatron-core's `q_layernorm` and `k_layernorm`: None, or set by the layer."""
        groups = self.num_query_groups_per_partition
        share = self.num_attention_heads_per_partition // groups
        self.heads = Heads(groups, share, self.hidden_size_per_attention_head)
        self.separate: Separated = separated
        """In training; `model/layers/separated.py` puts what does the same in one pass here."""
        self.windowed = has_window(self.config, self.layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ([s, b, h], bias if it is left to the caller).

        hidden_states: [s, b, h] (or [s / TP, b, h] under sequence parallelism).
        attention_mask: of `SdpaAttention`, or of all layers together (`model/layers/windows.py`).
        rotary_pos_emb: a `rotary_table`, or two side by side: the second for layers with a window.
        packed_seq_params: documents in a row, instead of a mask that hides them from each other.
        """
        attention_mask = own_mask(attention_mask, self.windowed)
        attend = self.core_attention
        if packed_seq_params is not None:
            attend = partial(attend, packed_seq_params=packed_seq_params)
        qkv, bias = self.linear_qkv(hidden_states)
        separate = self.separate if self.training else separated
        table = None if rotary_pos_emb is None else own_table(rotary_pos_emb, self.windowed)
        if self.q_layernorm is None and self.k_layernorm is None:
            query, key, value = separate(qkv, bias, table, self.heads)
        else:
            query, key, value = separate(qkv, bias, None, self.heads)
            query = query if self.q_layernorm is None else self.q_layernorm(query)
            key = key if self.k_layernorm is None else self.k_layernorm(key)
            query, key = turned(query, key, table)
        if self.v_layernorm is not None:
            value = self.v_layernorm(value)
        if self.checkpoint_core_attention and self.training:
            context = computed_again(attend, query, key, value, attention_mask)
        else:
            context = attend(query, key, value, attention_mask)
        return self.linear_proj(context)


class LocalCrossAttention(CrossAttention):
    """Megatron-core's cross-attention with a forward for training only.

    As `LocalSelfAttention`. Rows of keys and values: of every head its key, then its value.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for linear in (self.linear_q, self.linear_kv):
            linear.adds_bias = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        key_value_states: Tensor,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns ([s, b, h], bias if it is left to the caller).

        hidden_states: [s, b, h]; key_value_states: [t, b, h]
        (both divided by TP under sequence parallelism).
        attention_mask: True hides, broadcastable to [b, heads, s, t].
        """
        query, bias = self.linear_q(hidden_states)
        if bias is not None:
            query = query + bias
        both, bias = self.linear_kv(key_value_states)
        if bias is not None:
            both = both + bias
        heads, width = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        query = query.view(*query.shape[:2], heads, width)
        key, value = both.view(*both.shape[:2], heads, 2 * width).split(width, dim=-1)
        if self.checkpoint_core_attention and self.training:
            context = computed_again(self.core_attention, query, key, value, attention_mask)
        else:
            context = self.core_attention(query, key, value, attention_mask)
        return self.linear_proj(context)


def activated(inner: Tensor, bias: Tensor | None, function: Activation, gated: bool) -> Tensor:
    """The activation of inner [.., f] plus bias [f].

    gated: both have 2 f entries, and the activation of the first half multiplies the other.
    """
    if bias is not None:
        inner = inner + bias
    if not gated:
        return function(inner)
    gate, up = inner.chunk(2, dim=-1)
    return function(gate) * up


class LocalMLP(MLP):
    """Megatron-core's feed-forward with a forward for training only.

    A gate is one product, without an offset of zero added to a copy of its input.
    It brings its parts along, because Megatron-core warns once a layer of every specification
    of a feed-forward that it does not know by name.
    """

    def __init__(self, config: TransformerConfig) -> None:
        parts = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size)
        self.linear_fc1.adds_bias = False
        self.activate: Callable[[Tensor, Tensor | None, Activation, bool], Tensor] = activated
        """In training; `model/layers/activated.py` puts what computes the same in one pass here."""
        self.feed: Callable[[Tensor, ColumnLinear, RowLinear, Activation, bool], Tensor] | None = None
        """In training; what computes all of it, with the activation inside of the products."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the shape of the input, and the bias if it is left to the caller.

        hidden_states: [s, b, h] (or [s / TP, b, h] under sequence parallelism).
        """
        function, gated, second = self.activation_func, self.config.gated_linear_unit, self.linear_fc2
        if self.feed is not None and self.training:
            out = self.feed(hidden_states, self.linear_fc1, second, function, gated)
            return out, second.bias if second.leaves_bias else None
        inner, bias = self.linear_fc1(hidden_states)
        activate = self.activate if self.training else activated
        return second(activate(inner, bias, function, gated))
