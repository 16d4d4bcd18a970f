"""Feed-forwards whose activations and norms after them are one pass, whatever computes it.

The kernels themselves: `tests/model/layers/test_join_kernel.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.layers.activated import activate_at_once
from model.layers.normed import norm_at_once
from model.layers.torch_parts import Norm, activated
from model.network.language_model import LanguageModel
from parallel.launch.one_process import single_process
from tests.model.layers.normed_worker import normed
from tests.model.layers.test_compiled import LLAMA, WINDOWS, build, loss_and_gradients
from tests.model.layers.test_joined import equal, norms_apart
from tests.model.narrow import narrow, tokens

CALLS: list[int] = []


def watched(*given: Any) -> Tensor:
    """What computes both, here plain PyTorch."""
    CALLS.append(1)
    return normed(*given)


def put_together(model: LanguageModel) -> int:
    """As `pass_at_once` does."""
    CALLS.clear()
    activate_at_once([model], activated)
    return norm_at_once([model], watched)


def hidden_norms(model: LanguageModel) -> set[Norm]:
    return {layer.mlp.linear_fc2.input_norm for layer in model.decoder.layers}


@pytest.mark.parametrize("changes", [{}, {"activation": "geglu"}, LLAMA], ids=["plain", "gate", "llama"])
def test_a_model_computes_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And its norms of hidden layers compute nothing, but in evaluation."""
    single_process()
    model = build("subln", layers=3, **changes).double()
    apart = norms_apart(monkeypatch)

    def change() -> None:
        assert put_together(model) == 3
        apart.clear()

    equal(model, WINDOWS, change)
    assert len(CALLS) == 3
    assert not hidden_norms(model) & set(apart)
    model.eval()
    loss_and_gradients(model)
    assert len(CALLS) == 3
    assert hidden_norms(model) <= set(apart)


@pytest.mark.parametrize("recomputed", ["selective", "full"])
def test_recomputation(recomputed: str) -> None:
    full = {"recompute_method": "uniform", "recompute_num_layers": 1}
    core: dict[str, Any] = {"recompute_granularity": recomputed}
    core |= full if recomputed == "full" else {"recompute_modules": ["core_attn"]}
    model = narrow("subln", 3, core=core).double()
    equal(model, {"tokens": tokens(), "labels": tokens()}, lambda: put_together(model))
    assert len(CALLS) == 3 * (1 + (recomputed == "full"))


@pytest.mark.parametrize("place", ["mlp.linear_fc2.input_norm", "mlp.linear_fc2"])
def test_hooks_hear_what_they_would_hear(place: str) -> None:
    """What enters the norm, from either side of it; the other layers are one pass."""
    single_process()
    model = build("subln", layers=3).double()
    heard: list[tuple[Tensor, Tensor]] = []
    part = model.decoder.layers[1].get_submodule(place)
    part.register_forward_hook(
        lambda module, args, out: heard.append((args[0], out[0] if isinstance(out, tuple) else out))
    )
    part.register_forward_pre_hook(lambda module, args: None)
    equal(model, WINDOWS, lambda: put_together(model))
    assert len(CALLS) == 2
    for apart, again in zip(*heard, strict=True):
        torch.testing.assert_close(again, apart, rtol=1e-12, atol=1e-14)


def test_a_norm_of_anything_else_computes_itself() -> None:
    single_process()
    model = build("subln", layers=2).double()
    put_together(model)
    loss_and_gradients(model)
    norm = model.decoder.layers[1].mlp.linear_fc2.input_norm
    x = torch.randn(4, 2, 128, dtype=torch.float64)
    assert torch.equal(norm(x), norm.apart(x))
    assert norm.fed.ready is None  # nothing is kept alive


def test_what_no_program_holds_stays_apart() -> None:
    """Norms that ranks share, wide ones, and feed-forwards without a norm."""
    single_process()
    assert put_together(build("pre_ln", layers=2)) == 0
    assert put_together(build("subln", layers=2, ffn_hidden_size=8193)) == 0

    class Two:
        def size(self) -> int:
            return 2

    model = build("subln", layers=2)
    model.decoder.layers[0].mlp.linear_fc2.input_norm.group = Two()
    assert put_together(model) == 1
