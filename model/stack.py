"""A stack of our layers for researchers: any scheme and precision, plain arrays by plain names.

    from parallel.launch.one_process import single_process
    from model.stack import Stack

    single_process()
    stack = Stack("b2t", num_layers=6, hidden_size=32, num_attention_heads=4, causal=False)
    stack.set_weights(0, {"q": wq, "k": wk, "v": wv, "o": wo, "fc1": w1, "fc2": w2})
    y = stack(x)                      # [batch, tokens, hidden]
    y.square().sum().backward()
    stack.gradients(0)["q"]           # the same names

Names of one layer:
q, k, v, o, fc1, fc2 and their biases bq ... bfc2 (a gated fc1 has rows [gate; up]);
of cross-attention cq, ck, cv, co, cbq ...;
norms by their place, `input_layernorm`, `pre_cross_attn_layernorm`, `pre_mlp_layernorm`,
`mlp_output_norm` and so on, each with `.weight` and, for LayerNorm, `.bias`.
Matrices are [out, in]. In post-norm schemes `pre_mlp_layernorm` is the norm after attention and
`mlp_output_norm` the layer's last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth.folded import folded
from model.depth.plan import DepthPlan
from model.depth.scheme import Options
from model.layers.torch_parts import Norm
from model.layers.torch_spec import local_layer_spec
from model.layers.transformer_config import transformer_config
from model.parameters.table import layer_rows
from model.sections import AttentionConfig


class Stack(nn.Module):
    """Layers of one scheme, without embedding and output. Needs `single_process()` first.

    final_norm: with the scheme's norm after the stack, where it has one.
    model: further fields of `ModelConfig` (activation, normalization, num_query_groups, bias ...).
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
        **model: object,
    ) -> None:
        super().__init__()
        from megatron.core.process_groups_config import ProcessGroupCollection

        self.model_config = ModelConfig.model_validate(
            {
                "scheme": scheme,
                "num_layers": num_layers,
                "hidden_size": hidden_size,
                "num_attention_heads": num_attention_heads,
                "scheme_options": dict(options or {}),
                **model,
            }
        )
        if self.model_config.window is not None:
            raise ValueError("window: a stack by itself sees all tokens; build a LanguageModel")
        if self.model_config.position == "rotary":
            raise ValueError("position: a stack by itself rotates nothing; build a LanguageModel")
        if self.model_config.attention != AttentionConfig():
            raise ValueError("attention: a stack by itself has plain attention; build a LanguageModel")
        self.cross = cross
        config = transformer_config(self.model_config, dtype=dtype)
        self.plan = DepthPlan.of(
            scheme, num_layers, options, sublayers=3 if cross else 2, reach=self.model_config.reach
        )
        layers = folded(self.plan.layers, cross=cross)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.layers = nn.ModuleList()
        for number, layer in enumerate(layers, 1):
            spec = local_layer_spec(layer, causal=causal, cross=cross)
            self.layers.append(
                spec.module(config, spec.submodules, layer_number=number, pg_collection=groups, **spec.params)
            )
        self.unit = layers[-1].leaving
        """Of the stream that the last layer gives (`model/depth/folded.py`)."""
        epsilon = config.layernorm_epsilon / self.unit**2
        self.final_layernorm = (
            Norm(config, hidden_size, epsilon) if final_norm and self.plan.final_norm else None
        )
        self.to(dtype)

    def forward(self, x_bsh: Tensor, memory_bsh: Tensor | None = None) -> Tensor:
        """x_bsh: [batch, tokens, hidden]; memory_bsh: encoder output for cross-attention.

        Returns [batch, tokens, hidden].
        """
        x = x_bsh.transpose(0, 1)
        memory = None if memory_bsh is None else memory_bsh.transpose(0, 1)
        for layer in self.layers:
            x, _ = layer(x, context=memory)
        if self.final_layernorm is not None:
            x = self.final_layernorm(x)
        elif self.unit != 1.0:
            x = x * self.unit
        return x.transpose(0, 1)

    def _parts(self, index: int, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, _Part]:
        """What `of` gives for each parameter of a layer, by plain name; None is left out."""
        rows = layer_rows(self.model_config, self.plan.layers[index], index, cross=self.cross)
        own = {f"{row.module}.{row.leaf}": row for row in rows}
        found: dict[str, _Part] = {}
        for local, parameter in self.layers[index].named_parameters():
            row, tensor = own[local], of(parameter)
            if tensor is None:
                continue
            shape = (-1, *tensor.shape[1:])
            if row.blocks is None:
                found[local] = _Part(tensor, shape)
                continue
            mark = ("c" if row.sublayer == "cross" else "") + ("b" if row.leaf == "bias" else "")
            for role, view in row.blocks.by_role(tensor).items():
                found[mark + role] = _Part(view, shape)
        return found

    def names(self, index: int) -> list[str]:
        """Plain names of a layer's parameters."""
        return list(self._parts(index, nn.Parameter.detach))

    def set_weights(self, index: int, values: Mapping[str, ArrayLike | Tensor]) -> None:
        """Sets some or all of layer `index` by plain name.

        values: arrays or tensors [out, in] or [out].
        """
        parts = self._parts(index, nn.Parameter.detach)
        for name, value in values.items():
            if name not in parts:
                raise ValueError(f"layer {index} has no {name!r}; it has {', '.join(parts)}")
            target = parts[name].view
            source = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value)
            if source.numel() != target.numel():
                raise ValueError(
                    f"layer {index}: {name} has {target.numel()} elements, got {tuple(source.shape)}"
                )
            target.copy_(source.detach().reshape(target.shape))

    def weights(self, index: int) -> dict[str, Tensor]:
        """Copies of layer `index`'s parameters by plain name, as [out, in] or [out]."""
        return {name: part.copy() for name, part in self._parts(index, nn.Parameter.detach).items()}

    def gradients(self, index: int) -> dict[str, Tensor]:
        """Gradients of layer `index` by plain name; parameters without one are left out."""
        return {name: part.copy() for name, part in self._parts(index, lambda one: one.grad).items()}


class _Part(NamedTuple):
    """What has one plain name: a view into a layer's tensor, and the shape to show it in."""

    view: Tensor
    shape: tuple[int, ...]

    def copy(self) -> Tensor:
        """A copy of the view, [out, in] or [out]."""
        return self.view.reshape(self.shape).clone()
