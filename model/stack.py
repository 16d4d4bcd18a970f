"""A stack of our layers for researchers: any scheme, any precision, plain arrays in and out under plain names.

    from parallel.launch.one_process import single_process
    from model.stack import Stack

    single_process()
    stack = Stack("b2t", num_layers=6, hidden_size=32, num_attention_heads=4, causal=False, dtype=torch.float64)
    stack.set_weights(0, {"q": wq, "k": wk, "v": wv, "o": wo, "fc1": w1, "fc2": w2, "pre_mlp_layernorm.weight": g})
    y = stack(x)                      # [batch, tokens, hidden]
    y.square().sum().backward()
    stack.gradients(0)["q"]           # the same names

Names of one layer: q, k, v, o, fc1, fc2 and their biases bq ... bfc2 (a gated fc1 has rows [gate; up]); cross-attention: cq, ck, cv, co, cbq ...; norms by
their place: `input_layernorm`, `pre_cross_attn_layernorm`, `pre_mlp_layernorm`, `mlp_output_norm` and so on, each with `.weight` and, for LayerNorm, `.bias`.
Matrices are [out, in]. In post-norm schemes `pre_mlp_layernorm` is the norm after attention and `mlp_output_norm` the layer's last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth.folded import folded
from model.depth.scheme import SCHEMES, Options
from model.families.gpt import transformer_config
from model.layers.torch_parts import Norm
from model.layers.torch_spec import local_layer_spec

MATRICES = {
    "self_attention.linear_proj": ("", "o"),
    "mlp.linear_fc1": ("", "fc1"),
    "mlp.linear_fc2": ("", "fc2"),
    "cross_attention.linear_q": ("c", "q"),
    "cross_attention.linear_proj": ("c", "o"),
}


class Stack(nn.Module):
    """Layers of one scheme without embedding and output; with the scheme's norm after the stack where `final_norm` is set.

    model: further fields of `ModelConfig` (activation, normalization, num_query_groups, bias, hidden_dropout ...). Needs `single_process()` first.
    Raises ValueError for unknown schemes, options and names.
    """

    def __init__(
        self,
        scheme: str,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        options: Options | None = None,
        causal: bool = True,
        cross: bool = False,
        final_norm: bool = False,
        dtype: torch.dtype = torch.float32,
        **model: Any,
    ) -> None:
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection

        self.model_config = ModelConfig(
            scheme=scheme,
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            scheme_options=dict(options or {}),
            **model,
        )
        config = transformer_config(self.model_config, dtype=dtype)
        plan = folded(SCHEMES[scheme].plan(num_layers, options, sublayers=3 if cross else 2), cross=cross)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.layers = nn.ModuleList()
        for number, layer in enumerate(plan, 1):
            spec = local_layer_spec(layer, causal=causal, cross=cross)
            self.layers.append(
                spec.module(config, spec.submodules, layer_number=number, pg_collection=groups, **spec.params)
            )
        self.unit = plan[-1].leaving
        """Of the stream that the last layer gives (`model/depth/folded.py`)."""
        epsilon = config.layernorm_epsilon / self.unit**2
        self.final_layernorm = (
            Norm(config, hidden_size, epsilon) if final_norm and SCHEMES[scheme].final_norm else None
        )
        self.to(dtype)

    def forward(self, x_bsh: Tensor, memory_bsh: Tensor | None = None) -> Tensor:
        """x_bsh: [batch, tokens, hidden]; memory_bsh: encoder output for cross-attention. Returns [batch, tokens, hidden]."""
        x = x_bsh.transpose(0, 1)
        memory = None if memory_bsh is None else memory_bsh.transpose(0, 1)
        for layer in self.layers:
            x, _ = layer(x, context=memory)
        if self.final_layernorm is not None:
            x = self.final_layernorm(x)
        elif self.unit != 1.0:
            x = x * self.unit
        return x.transpose(0, 1)

    def _parts(self, index: int) -> Iterator[tuple[str, Any]]:
        """(plain name, function from the parameter or its gradient's tensor to the named view of it) of a layer, with the parameter."""
        model, own = self.model_config, dict(self.layers[index].named_parameters())
        per_group = model.num_attention_heads // model.groups
        blocks = {
            "q": slice(0, per_group),
            "k": slice(per_group, per_group + 1),
            "v": slice(per_group + 1, per_group + 2),
        }
        for full, parameter in own.items():
            module, _, kind = full.rpartition(".")
            mark = "b" if kind == "bias" else ""
            if module == "self_attention.linear_qkv":
                for role, rows in blocks.items():
                    yield (
                        mark + role,
                        (
                            parameter,
                            lambda t, rows=rows: t.unflatten(0, (model.groups, per_group + 2, -1))[:, rows],
                        ),
                    )
            elif module == "cross_attention.linear_kv":
                for role, row in (("k", 0), ("v", 1)):
                    yield (
                        "c" + mark + role,
                        (
                            parameter,
                            lambda t, row=row: t.unflatten(0, (model.num_attention_heads, 2, -1))[:, row],
                        ),
                    )
            else:
                side, role = MATRICES.get(module, ("", ""))
                yield (side + mark + role if role else full), (parameter, lambda t: t)

    def names(self, index: int) -> list[str]:
        """Plain names of a layer's parameters."""
        return [name for name, _ in self._parts(index)]

    def set_weights(self, index: int, values: Mapping[str, Any]) -> None:
        """Sets some or all of layer `index` from arrays or tensors under plain names; shapes [out, in] or [out]."""
        parts = dict(self._parts(index))
        for name, value in values.items():
            if name not in parts:
                raise ValueError(f"layer {index} has no {name!r}; it has {', '.join(parts)}")
            parameter, view = parts[name]
            with torch.no_grad():
                target = view(parameter)
                source = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value)
                if source.numel() != target.numel():
                    raise ValueError(
                        f"layer {index}: {name} has {target.numel()} elements, got {tuple(source.shape)}"
                    )
                target.copy_(source.reshape(target.shape))

    def weights(self, index: int) -> dict[str, Tensor]:
        """Copies of layer `index`'s parameters by plain name, as [out, in] or [out]."""
        return {
            name: _plain(view(parameter.detach()), parameter)
            for name, (parameter, view) in self._parts(index)
        }

    def gradients(self, index: int) -> dict[str, Tensor]:
        """Gradients of layer `index` by plain name; parameters without one are left out."""
        return {
            name: _plain(view(parameter.grad), parameter)
            for name, (parameter, view) in self._parts(index)
            if parameter.grad is not None
        }


def _plain(part: Tensor, parameter: Tensor) -> Tensor:
    return part.reshape(-1, parameter.shape[-1]).clone() if parameter.dim() == 2 else part.reshape(-1).clone()
