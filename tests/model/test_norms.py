"""Every kind of norm is the same function wherever it is written.

In the layers, the plain reference's definition and exported code.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from model.config import ModelConfig
from model.hf.remote.configuration_fathom import FathomConfig
from model.hf.remote.modeling_fathom import FathomNorm
from model.layers.torch_parts import KERNELS, Norm, norm_by_parts
from model.layers.transformer_config import transformer_config
from model.norms import NORMS

SIZE, EPS = 8, 1e-3


def test_the_configuration_offers_the_table() -> None:
    assert get_args(ModelConfig.model_fields["normalization"].annotation) == tuple(NORMS)
    assert {kind.core for kind in NORMS.values()} == set(KERNELS)


@pytest.mark.parametrize("name", list(NORMS))
def test_every_kind_is_one_function_everywhere(name: str) -> None:
    kind = NORMS[name]
    config = ModelConfig.model_validate(
        {"num_layers": 1, "hidden_size": SIZE, "num_attention_heads": 1, "normalization": name}
    )
    generator = torch.Generator().manual_seed(0)
    x, gain, bias = (torch.randn(3, SIZE, generator=generator, dtype=torch.float64) for _ in range(3))
    values = dict(zip(kind.leaves, (gain[0], bias[0]), strict=False))
    expected = kind.of(x, gain[0], values.get("bias"), EPS)

    layer = Norm(transformer_config(config, dtype=torch.float64), SIZE, EPS)
    exported = FathomNorm(FathomConfig(hidden_size=SIZE, normalization=name, norm_epsilon=EPS)).double()
    for module in (layer, exported):
        assert {leaf for leaf, _ in module.named_parameters()} == set(kind.leaves)
        module.load_state_dict(values)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(exported(x), expected, rtol=0, atol=1e-12)
    compiled = norm_by_parts(x, gain[0], values.get("bias"), torch.tensor(EPS, dtype=torch.float64))
    assert torch.allclose(compiled, expected, rtol=0, atol=1e-12)
