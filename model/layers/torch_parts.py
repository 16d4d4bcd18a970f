"""Parts of the layer without Transformer Engine: norms, linear layers and attention.

They are for CPUs, and for GPUs where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

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

from model.layers.regions import product_of_columns, product_of_rows
from model.layers.windows import has_window, own_mask, own_table
from model.norms import NORMS

if TYPE_CHECKING:
    from model.layers.joined import Follower

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

    fed: Follower | None = None
    """What has its result from the join before it."""

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
    """

    adds_bias = True

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
        if compiled and not self.adds_bias:
            return F.linear(input_, weight), self.bias
        return F.linear(input_, weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Row-parallel linear layer.

    Without tensor parallelism the bias goes into the matrix product instead of to the caller.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.input_norm: nn.Module | None = None
        """Of what enters, where the layer has set one."""

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
        if compiled:
            return F.linear(input_, self.weight), self.bias
        return F.linear(input_, self.weight, self.bias), None


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


class LocalSelfAttention(SelfAttention):
    """Megatron-core's self-attention with a forward for training only.

    It has the same parameters and layout, and takes less host time per layer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.linear_qkv.adds_bias = False
        self.v_layernorm: nn.Module | None = None
        """As Megatron-core's `q_layernorm` and `k_layernorm`: None, or set by the layer."""
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
        if bias is not None:
            qkv = qkv + bias
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        per_group = self.num_attention_heads_per_partition // groups
        # Rows of one group: its query heads, then its key, then its value.
        qkv = qkv.view(*qkv.shape[:2], groups, (per_group + 2) * width)
        query, key, value = qkv.split([per_group * width, width, width], dim=-1)
        query = query.reshape(*query.shape[:2], groups * per_group, width)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        if self.v_layernorm is not None:
            value = self.v_layernorm(value)
        if rotary_pos_emb is not None:
            cos, sin = own_table(rotary_pos_emb, self.windowed).chunk(2, dim=-1)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
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

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the shape of the input, and the bias if it is left to the caller.

        hidden_states: [s, b, h] (or [s / TP, b, h] under sequence parallelism).
        """
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation_func(gate) * up
        else:
            inner = self.activation_func(inner)
        return self.linear_fc2(inner)
