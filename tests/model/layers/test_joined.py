"""What is handed from a join to the norm after it, whatever computes both.

The kernels themselves: `tests/model/layers/test_join_kernel.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.depth.schemes import SCHEMES
from model.layers.joined import join_norms, joined
from model.layers.layer import DepthLayer
from model.layers.one_pass import pass_at_once
from model.layers.torch_parts import Norm
from model.network.language_model import LanguageModel
from parallel.launch.one_process import single_process
from tests.model.layers.test_compiled import PAIRS, VOCAB_SIZE, WINDOWS, build, counting, loss_and_gradients
from tests.model.narrow import BF16, narrow, open_gates, seen, tokens

MADE: list[bool] = []
"""Calls of `plain`: whether there was a norm."""


def plain(*given: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What computes both, here plain PyTorch."""
    stream, normed, again = joined(*given)
    MADE.append(normed is not None)
    if normed is not None and given[-1].forked:
        again = normed.clone()
    return stream, normed, again


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[bool]]:
    """Calls of `plain` in a test."""
    MADE.clear()
    single_process()
    torch._dynamo.reset()
    yield MADE
    torch._dynamo.reset()


def norms_apart(monkeypatch: pytest.MonkeyPatch) -> list[Norm]:
    """The norms of the stream that compute their results themselves from here on."""
    heard: list[Norm] = []
    apart = Norm.apart

    def watched(self: Norm, x: Tensor) -> Tensor:
        heard.append(self)
        return apart(self, x)

    monkeypatch.setattr(Norm, "apart", watched)
    return heard


def equal(model: LanguageModel, batch: dict[str, Tensor], change: Callable[[], object]) -> None:
    """Loss and gradients are the same after a change, in fp64."""
    loss, gradients = loss_and_gradients(model, batch)
    change()
    again, others = loss_and_gradients(model, batch)
    assert float(again) == pytest.approx(float(loss), rel=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12)


# Of 8 joins of four layers, and of norms apart: the first, two in a row, those of branches, heads.
LINKED = {
    "pre_ln": (8, 1),
    "post_ln": (8, 0),
    "b2t": (8, 0),
    "deepscalelm_pre_ln": (8, 1),
    "deepscalelm_post_ln": (8, 1),
    "deepnorm": (8, 0),
    "layernorm_scaling": (8, 1),
    "peri_ln": (8, 1 + 1 + 8),
    "mix_ln": (8, 1),
    "spannorm": (8, 1),
    "keel": (8, 7),
    "gpas": (8, 1),
    "hybridnorm": (5, 4 * 3),
    "subln": (8, 1 + 8),
}


FORKED = {
    **dict.fromkeys(("post_ln", "b2t", "deepscalelm_post_ln", "deepnorm"), 7),
    "mix_ln": 1,
    "spannorm": 3,
    "hybridnorm": 4,
}
"""Branches among those that read what is the stream too."""


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme_computes_the_same(
    scheme: str, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No norm computes what its join has computed, and none goes without."""
    model = build(scheme, layers=4).double()
    open_gates(model)
    joins, apart = LINKED[scheme]
    heard = norms_apart(monkeypatch)

    def change() -> None:
        heard.clear()
        assert join_norms([model], plain) == joins

    equal(model, WINDOWS, change)
    assert calls == [True] * joins
    assert len(heard) == apart
    assert sum(len(layer.forks) for layer in model.decoder.layers) == FORKED.get(scheme, 0)
    model.eval()
    loss_and_gradients(model)
    assert len(calls) == joins  # evaluation has both apart


def test_who_listens_to_a_gate_hears_what_enters_it(calls: list[bool]) -> None:
    heard: list[bool] = []
    model = build("gpas", layers=2).double()
    open_gates(model)
    gate = model.decoder.layers[0].gpas
    gate.register_forward_hook(lambda one, args, out: heard.append(torch.equal(args[0], out)))
    equal(model, WINDOWS, lambda: join_norms([model], plain))
    assert heard == [False] * 4  # two joins, apart and again
    assert len(calls) == 2  # those of the other layer


@pytest.mark.parametrize("scheme", ["b2t", "deepscalelm_pre_ln", "peri_ln", "keel"])
def test_two_stacks_compute_the_same(scheme: str, calls: list[bool]) -> None:
    sizes: dict[str, Any] = {"family": "seq2seq", "encoder_layers": 3, "vocab_size": VOCAB_SIZE}
    model = build(scheme, layers=3, **sizes).double()
    equal(model, PAIRS, lambda: join_norms([model], plain))
    assert len(calls) >= 3 + 2 * 3


def test_rmsnorm_without_biases(calls: list[bool]) -> None:
    model = build("pre_ln", layers=2, normalization="rmsnorm", bias=False).double()
    equal(model, WINDOWS, lambda: join_norms([model], plain))
    assert calls == [True] * 4


@pytest.mark.parametrize(
    ("core", "joins"),
    [
        ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, 8),
        # Only attention's joins have their norms in the same layer; each is computed twice.
        (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
            2 * 4,
        ),
        # And the join between the two layers of a group.
        (
            {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
            2 * 6,
        ),
    ],
    ids=["selective", "full", "full, groups of 2"],
)
def test_recomputation(core: dict[str, Any], joins: int, calls: list[bool]) -> None:
    model = narrow("pre_ln", 4, core=core).double()
    equal(model, {"tokens": tokens(), "labels": tokens()}, lambda: join_norms([model], plain))
    assert calls == [True] * joins


def test_hooks_hear_what_they_would_hear() -> None:
    """The gradient of the stream has what comes through the norm too."""
    model = build("pre_ln", layers=3).double()
    heard: list[Tensor] = []

    def entering(module: DepthLayer, args: Any, kwargs: dict[str, Tensor]) -> None:
        kwargs["hidden_states"].register_hook(heard.append)

    handle = model.decoder.layers[1].register_forward_pre_hook(entering, with_kwargs=True)
    equal(model, WINDOWS, lambda: join_norms([model], plain))
    handle.remove()
    loss_and_gradients(model)
    apart, joined_ = heard
    torch.testing.assert_close(joined_, apart, rtol=1e-12, atol=0)


def test_a_norm_of_another_stream_computes_itself() -> None:
    model = build("pre_ln", layers=2).double()
    join_norms([model], plain)
    loss_and_gradients(model)
    norm = model.decoder.layers[1].input_layernorm
    x = torch.randn(4, 2, 32, dtype=torch.float64)
    assert torch.equal(norm(x), norm.apart(x))
    assert norm.fed.ready is None


@pytest.mark.parametrize("scheme", ["pre_ln", "layernorm_scaling", "deepnorm"])
def test_an_fp32_stream_is_handed_over_in_the_format_of_the_branch(scheme: str, calls: list[bool]) -> None:
    """It is normed before it is rounded, so that the result is a little nearer to fp32's."""
    core = {"fp32_residual_connection": True}
    model = narrow(scheme, 6, BF16, core=core)
    apart = seen(model).logits
    join_norms([model], plain)
    after = seen(model).logits  # of layers under hooks, but the first and the last, joined
    exact = seen(narrow(scheme, 6)).logits
    assert len(calls) >= 8
    assert float((after - exact).norm()) < 1.1 * float((apart - exact).norm())


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_compilations_do_not_grow_with_the_depth(scheme: str) -> None:
    graphs, backend = counting()
    compiled = torch.compile(joined, fullgraph=True, dynamic=False, backend=backend)
    model = build(scheme, layers=12).double()
    equal(model, WINDOWS, lambda: join_norms([model], compiled, compiled=True))
    assert len(graphs) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["b2t", "deepscalelm_pre_ln", "layernorm_scaling"])
def test_inductor_gives_the_same_numbers(scheme: str) -> None:
    model = build(scheme, layers=3).double()
    equal(model, WINDOWS, lambda: pass_at_once([model], "compile"))


@pytest.mark.slow
def test_compiled_dropout_is_repeated_by_recomputation() -> None:
    core = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    losses = []
    for fields in ({}, core):
        model = narrow("pre_ln", 3, core=fields, hidden_dropout=0.1).double()
        pass_at_once([model], "compile")
        torch.manual_seed(3)
        loss, gradients = loss_and_gradients(model, {"tokens": tokens(), "labels": tokens()})
        losses.append((float(loss), float(sum(one.square().sum() for one in gradients.values()))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)
