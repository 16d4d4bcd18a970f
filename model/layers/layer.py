"""One transformer layer for all depth schemes.

It is Megatron-core's layer with its forward replaced by the residual algebra of
`model/depth/scheme.py`, in the units of `model/depth/folded.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from model.depth.folded import FoldedLayer, FoldedSublayer
from model.layers.cut_norm import CutNorm
from model.layers.residual import ResidualJoin, StreamGate

if TYPE_CHECKING:
    from model.layers.joined import Follower


@dataclass
class DepthLayerSubmodules(TransformerLayerSubmodules):
    """Megatron-core's parts plus the norms that only some schemes have.

    These are on a branch before the join, and on the stream after it.
    """

    self_attention_branch_norm: ModuleSpec | type = IdentityOp
    self_attention_output_norm: ModuleSpec | type = IdentityOp
    cross_attention_branch_norm: ModuleSpec | type = IdentityOp
    cross_attention_output_norm: ModuleSpec | type = IdentityOp
    mlp_branch_norm: ModuleSpec | type = IdentityOp
    mlp_output_norm: ModuleSpec | type = IdentityOp
    head_norm: ModuleSpec | type = IdentityOp
    """Of queries, keys or values; the plan says of which."""


EXTRA_NORMS = tuple(
    f"{part}_{place}_norm"
    for part in ("self_attention", "cross_attention", "mlp")
    for place in ("branch", "output")
)


class DepthLayer(TransformerLayer):
    """A transformer layer whose connections are data.

    plan: coefficients and norm positions of this layer, for its global layer number.
    The stream that enters and leaves is in the plan's units,
    and in fp32 with `config.fp32_residual_connection`.
    Parts, names and tensor-parallel behaviour are Megatron-core's,
    so that any specification (local or Transformer Engine) can fill them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DepthLayerSubmodules,
        plan: FoldedLayer,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        self.plan = plan
        self.has_cross = not isinstance(self.cross_attention, IdentityOp)
        # Only norms that exist become modules:
        # an identity costs host time in every layer of every step.
        self.norms: dict[str, bool] = {}
        for name in EXTRA_NORMS:
            spec = getattr(submodules, name)
            self.norms[name] = spec is not IdentityOp
            if self.norms[name]:
                setattr(
                    self,
                    name,
                    build_module(
                        spec, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
                    ),
                )
        self._norm_heads(config, submodules)
        for part, linear, width in (
            (
                plan.attention,
                self.self_attention.linear_proj,
                config.num_attention_heads * config.kv_channels,
            ),
            (plan.mlp, self.mlp.linear_fc2, config.ffn_hidden_size),
        ):
            if part.norm_last:
                linear.input_norm = CutNorm(config, width, self.self_attention.pg_collection.tp)
        self.forks: dict[str, Follower] = {}
        """By sublayer, whose norm gives its input and the stream (`model/layers/joined.py`)."""
        self.gated = plan.gate
        if self.gated:
            self.gpas = StreamGate(config)
        # A first linear layer that norms its input itself hands the normed input over
        # where the residual is taken from there.
        self.normed_by_qkv = hasattr(self.self_attention.linear_qkv, "take_normed")
        self.normed_by_fc1 = hasattr(self.mlp.linear_fc1, "take_normed")
        self.self_attention_join = ResidualJoin(plan.attention, self.hidden_dropout)
        if self.has_cross:
            self.cross_attention_join = ResidualJoin(plan.cross, self.hidden_dropout)
        self.mlp_join = ResidualJoin(plan.mlp, self.hidden_dropout)
        # As `ResidualJoin.shared_branch_scale`.
        self.attention_input_scale: Tensor | None = None
        self.cross_input_scale: Tensor | None = None
        self.mlp_input_scale: Tensor | None = None
        self.fp32_stream = bool(config.fp32_residual_connection)
        self.branch_dtype = config.params_dtype
        self._set_epsilons(config.layernorm_epsilon)
        self.compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None
        # Then a forward pass is one without gradients, and the backward pass makes another.
        self.computed_again = config.recompute_granularity == "full"

    def _norm_heads(self, config: TransformerConfig, submodules: DepthLayerSubmodules) -> None:
        """Gives attention the norms of its heads that the plan has."""
        for role in self.plan.attention.inner:
            norm = build_module(
                submodules.head_norm,
                config=config,
                hidden_size=config.kv_channels,
                eps=config.layernorm_epsilon,
            )
            # A rank norms its own heads, so that its gradients are partial sums in any case.
            for parameter in norm.parameters():
                parameter.sequence_parallel = config.tensor_model_parallel_size > 1
            setattr(self.self_attention, f"{role}_layernorm", norm)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, compiled where `model/layers/compiled.py` said so and nobody listens.

        Hooks and evaluation get the layer as it is.
        """
        if self.runs_compiled:
            assert self.compiled is not None
            return self.compiled(self, *args, **kwargs)
        return self.as_it_is(*args, **kwargs)

    def as_it_is(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, not compiled."""
        return super().__call__(*args, **kwargs)

    @property
    def runs_compiled(self) -> bool:
        """Whether a pass of now is a compiled one."""
        return (
            self.compiled is not None
            and self.training
            and not self._forward_hooks
            and not self._forward_pre_hooks
            and (self.computed_again or torch.is_grad_enabled())
        )

    def parts(self) -> Iterator[tuple[str, FoldedSublayer, ResidualJoin, Any, Any]]:
        """(name, plan, join, module that norms its input, module that norms its sum) by sublayer.

        A linear layer may norm its input itself.
        """
        parts = [("self_attention", "attention", self.input_layernorm, self.self_attention.linear_qkv)]
        if self.has_cross:
            parts.append(
                ("cross_attention", "cross", self.pre_cross_attn_layernorm, self.cross_attention.linear_q)
            )
        parts.append(("mlp", "mlp", self.pre_mlp_layernorm, self.mlp.linear_fc1))
        for module, name, norm, linear in parts:
            entrance = linear if isinstance(norm, IdentityOp) else norm
            yield (
                name,
                getattr(self.plan, name),
                getattr(self, f"{module}_join"),
                entrance,
                getattr(self, f"{module}_output_norm", None),
            )

    def last_linear(self, name: str) -> Any:
        """The linear layer that ends a sublayer's branch, by the sublayer's name in `parts`."""
        if name == "mlp":
            return self.mlp.linear_fc2
        return (self.cross_attention if name == "cross" else self.self_attention).linear_proj

    def joins(self) -> list[ResidualJoin]:
        """The residual joins, in the order of the stream."""
        return [join for _, _, join, _, _ in self.parts()]

    def _set_epsilons(self, epsilon: float) -> None:
        """Gives the norms of the stream the epsilon of its units.

        Raises TypeError for a norm that has none to set.
        """
        for _, plan, _, norm_in, norm_out in self.parts():
            for norm, value in (
                (norm_in if plan.norm_in else None, plan.epsilon_in(epsilon)),
                (norm_out if plan.norm_out else None, plan.epsilon_out(epsilon)),
            ):
                if norm is not None and not hasattr(norm, "eps"):
                    raise TypeError(f"{type(norm).__name__} has no attribute eps")
                if norm is not None:
                    norm.eps = value

    def numbers(self) -> Iterator[tuple[str, Any, str, float]]:
        """What may differ between layers of one kind.

        (place in a layer, module, its attribute for the number in a tensor, number).
        """
        for name, plan, join, norm_in, norm_out in self.parts():
            yield f"{name} input", self, f"{name}_input_scale", plan.input_scale
            yield f"{name} branch", join, "shared_branch_scale", plan.branch_scale
            if plan.norm_in:
                yield f"{name} norm", norm_in, "shared_eps", norm_in.eps
            if plan.norm_out:
                yield f"{name} output norm", norm_out, "shared_eps", norm_out.eps

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        attention_bias: None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the stream [s, b, h] and the context unchanged.

        hidden_states: [s, b, h].
        context: encoder output [s_enc, b, h] for layers with cross-attention.
        Masks: True hides, or None for the layer's own mask type.
        packed_seq_params: as `LocalSelfAttention`; where it is None it is not handed on.
        Raises ValueError for a bias on scores, which it does not have.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias has no effect in this layer")
        packed = {} if packed_seq_params is None else {"packed_seq_params": packed_seq_params}
        layer_input = stream = hidden_states

        branch_input, residual = self._enter("attention", self.plan.attention, self.input_layernorm, stream)
        self.self_attention_join.offer(residual)
        branch, bias = self.self_attention(
            branch_input, attention_mask, rotary_pos_emb=rotary_pos_emb, **packed
        )
        if self.normed_by_qkv:
            residual = self.self_attention.linear_qkv.take_normed()
        stream = self._leave("self_attention", residual, branch, bias, layer_input)

        if self.has_cross:
            assert context is not None
            branch_input, residual = self._enter(
                "cross", self.plan.cross, self.pre_cross_attn_layernorm, stream
            )
            self.cross_attention_join.offer(residual)
            branch, bias = self.cross_attention(
                branch_input,
                attention_mask=context_mask,
                key_value_states=context.to(self.branch_dtype) if self.fp32_stream else context,
            )
            stream = self._leave("cross_attention", residual, branch, bias, layer_input)

        branch_input, residual = self._enter("mlp", self.plan.mlp, self.pre_mlp_layernorm, stream)
        self.mlp_join.offer(residual)
        branch, bias = self.mlp(branch_input)
        if self.normed_by_fc1:
            residual = self.mlp.linear_fc1.take_normed()
        return self._leave("mlp", residual, branch, bias, layer_input), context

    def _enter(self, part: str, plan: FoldedSublayer, norm: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
        """Branch input and residual of a sublayer, both [s, b, h].

        norm: an identity where there is none, or where it is part of the linear layer. Branches
        compute in the format of the weights, whatever the stream's. What `model/layers/joined.py`
        feeds gives that format, and multiplies by the factor on its way.
        """
        fed = None if isinstance(norm, IdentityOp) else getattr(norm, "fed", None)
        if isinstance(norm, IdentityOp):
            branch_input, residual = stream, stream
        elif plan.residual_from_norm:
            branch_input = residual = norm(stream)
        else:
            narrows = self.fp32_stream and fed is None
            branch_input, residual = norm(stream.to(self.branch_dtype) if narrows else stream), stream
        fork = self.forks.get(part)
        if fork is not None:
            branch_input = fork.branch_input(residual)
        shared = getattr(self, f"{part}_input_scale") if torch.compiler.is_compiling() else None
        if shared is not None:
            branch_input = branch_input * shared
        elif plan.input_scale != 1.0 and (fed is None or fed.scale == 1.0):
            branch_input = branch_input * plan.input_scale
        return branch_input.to(self.branch_dtype) if self.fp32_stream else branch_input, residual

    def _leave(
        self, part: str, residual: Tensor, branch: Tensor, bias: Tensor | None, layer_input: Tensor
    ) -> Tensor:
        """The new stream [s, b, h]: branch norm, join, gate, output norm."""
        if self.norms[f"{part}_branch_norm"]:
            branch, bias = (
                getattr(self, f"{part}_branch_norm")(branch if bias is None else branch + bias),
                None,
            )
        stream = getattr(self, f"{part}_join")(residual, branch, bias, layer_input)
        if self.fp32_stream:
            stream = stream.float()  # it is, unless the scheme keeps nothing of the stream before
        if self.gated:
            stream = self.gpas(stream)
        if self.norms[f"{part}_output_norm"]:
            stream = getattr(self, f"{part}_output_norm")(stream)
        return stream
