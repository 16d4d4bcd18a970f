"""Feed-forwards whose activations are handed their biases, whatever computes both.

The kernels themselves: `tests/model/layers/test_join_kernel.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.activated import activate_at_once, activate_in_products
from model.layers.activation_pass import KERNELS
from model.layers.joined import join_norms, joined
from model.layers.torch_parts import activated
from model.layers.transformer_config import ACTIVATIONS
from parallel.launch.one_process import single_process
from tests.model.layers.test_compiled import WINDOWS, build, counting, loss_and_gradients
from tests.model.layers.test_joined import equal


@pytest.mark.parametrize(
    "changes", [{}, {"activation": "geglu"}, {"activation": "relu2", "bias": False}], ids=str
)
def test_a_model_computes_the_same(changes: dict[str, Any]) -> None:
    """In training; evaluation has products with their biases."""
    single_process()
    biases: list[bool] = []

    def watched(inner: Tensor, bias: Tensor | None, *given: Any) -> Tensor:
        biases.append(bias is not None)
        return activated(inner, bias, *given)

    model = build("pre_ln", layers=3, **changes).double()

    def change() -> None:
        assert activate_at_once([model], watched) == 3

    equal(model, WINDOWS, change)
    assert biases == [changes.get("bias", True)] * 3
    model.eval()
    loss_and_gradients(model)
    assert len(biases) == 3


@pytest.mark.parametrize(
    ("changes", "fed"),
    [({}, 3), ({"activation": "geglu", "bias": False}, 3), ({"scheme": "subln"}, 0)],
    ids=str,
)
def test_a_model_computes_the_same_with_activations_inside(changes: dict[str, Any], fed: int) -> None:
    """Where no norm stands before the second product; biases of branches stay with their joins."""
    single_process()
    left: list[bool] = []

    def watched(x: Tensor, first: Any, second: Any, function: Any, gated: bool) -> Tensor:
        left.append(second.leaves_bias)
        bias = None if second.leaves_bias else second.bias
        return F.linear(
            activated(F.linear(x, first.weight, first.bias), None, function, gated), second.weight, bias
        )

    named: dict[str, Any] = {"scheme": "pre_ln", "layers": 3} | changes
    model = build(**named).double()

    def change() -> None:
        assert activate_in_products(model.decoder.layers, watched) == fed

    equal(model, WINDOWS, change)
    equal(model, WINDOWS, lambda: join_norms([model], joined))
    assert left == [False] * fed + [False] * fed + [True] * fed
    model.eval()
    loss_and_gradients(model)
    assert len(left) == 3 * fed


def test_every_activation_has_a_kernel() -> None:
    assert set(KERNELS) == set(ACTIVATIONS.values())


def test_layers_share_one_compilation() -> None:
    single_process()
    graphs, backend = counting()
    torch._dynamo.reset()
    compiled = torch.compile(activated, fullgraph=True, dynamic=False, backend=backend)
    model = build("pre_ln", layers=6).double()
    equal(model, WINDOWS, lambda: activate_at_once([model], compiled))
    torch._dynamo.reset()
    assert len(graphs) == 1
