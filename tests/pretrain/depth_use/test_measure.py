"""Skips, logit lens, branches and cosines against models that are computed from the start.

In fp64, and bit by bit in fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.depth.sublayer import Layer, Sublayer
from model.errors import UserError
from model.hf.reference import Evaluation
from pretrain.depth_use.measure import Batch, Measured, Plan, Skip, measure
from pretrain.depth_use.walk import Walk
from pretrain.trained.open import Trained, open_trained
from pretrain.trained.scorer import Scorer
from tests.pretrain.small import VOCAB, small_config, small_data, small_trainer
from tests.reference import deepscalelm, gpt, parts

LAYERS, WINDOW = 9, 16
EPSILON = 1e-2
"""Large enough to be felt in units other than 1."""
MODELS: dict[str, dict[str, Any]] = {
    "pre_ln": {"position": "rotary", "normalization": "rmsnorm", "bias": False},
    "post_ln": {"tie_embeddings": False},
    "b2t": {},
    "deepscalelm_pre_ln": {"norm_epsilon": EPSILON},
}
NOTHING = Sublayer(branch_scale=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("depth_use"))


@pytest.fixture(scope="module")
def model(data: Path) -> Callable[[str], Trained]:
    """Makes a model of a scheme, of nine layers, that has learned for a few steps."""

    @functools.cache
    def make(scheme: str) -> Trained:
        fields = {"num_layers": LAYERS, "scheme": scheme, **MODELS[scheme]}
        small_trainer(small_config(data, data.parent / scheme, 8, **fields)).run()
        return open_trained(data.parent / scheme / "small")

    return make


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request: pytest.FixtureRequest, model: Callable[[str], Trained]) -> Trained:
    return model(request.param)


def in_fp64(trained: Trained) -> Scorer:
    made = Scorer(trained, "fp32")
    made.model.double()
    return made


@pytest.fixture(scope="module")
def scorer(model: Callable[[str], Trained]) -> Scorer:
    """One model in fp64, where the scheme does not matter."""
    return in_fp64(model("b2t"))


@pytest.fixture(scope="module")
def exact(trained: Trained) -> float:
    """How near two evaluations in fp64 come. Megatron-core's rotary angles are in fp32."""
    return 1e-7 if trained.config.position == "rotary" else 1e-12


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Windows in batches of two sizes, of which some targets of the second do not count."""
    tokens = torch.randint(VOCAB, (4, WINDOW + 1), generator=torch.Generator().manual_seed(3))
    return [(tokens[:3], 0), (tokens[3:], 5)]


@pytest.fixture(scope="module")
def measured(trained: Trained, batches: list[Batch]) -> Measured:
    return measure(in_fp64(trained), Plan.of(LAYERS), batches)


class Without:
    """A model in fp64 some of whose layers are the identity, by the plain evaluation.

    It computes the scheme's own equation, every stretch of layers from the start. Of a last layer
    that ends the stack with a norm, that norm stays.
    """

    def __init__(self, trained: Trained) -> None:
        self.whole = Evaluation(
            dict(trained.weights), trained.config, logit_scale=trained.logit_scale, dtype=torch.float64
        )

    def log_p(self, batches: list[Batch], first: int, last: int) -> list[Tensor]:
        """[b, s, V] of every batch, without layers `first` to `last`, counted from 1."""
        layers = self.whole.plan.layers
        plan, self.whole.plan = (
            self.whole.plan,
            replace(
                self.whole.plan,
                layers=tuple(
                    self.nothing(number) if first <= number <= last else layer
                    for number, layer in enumerate(layers, 1)
                ),
            ),
        )
        found = [self.whole(tokens[:, :-1]).log_softmax(-1) for tokens, _ in batches]
        self.whole.plan = plan
        return found

    def nothing(self, number: int) -> Layer:
        """What stands for a layer that is left out."""
        ends = number == LAYERS and not self.whole.plan.final_norm
        return Layer(NOTHING, replace(NOTHING, norm_out=ends))

    def losses(self, batches: list[Batch], first: int, last: int) -> list[Tensor]:
        """Losses that count, of every window."""
        return [
            row[start:]
            for log_p, (tokens, start) in zip(self.log_p(batches, first, last), batches, strict=True)
            for row in -log_p.gather(2, tokens[:, 1:, None]).squeeze(2)
        ]


def test_a_skip_is_a_model_with_an_identity(
    trained: Trained, measured: Measured, batches: list[Batch], exact: float
) -> None:
    without = Without(trained)
    whole = without.losses(batches, 1, 0)
    assert measured.tokens == 3 * WINDOW + WINDOW - 5
    assert measured.loss == pytest.approx(float(torch.cat(whole).mean()), rel=exact)
    assert [skip.first for skip in measured.singles] == list(range(1, LAYERS + 1))
    blocks = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 7), (8, 8), (9, 9)]
    assert [(skip.first, skip.last) for skip in measured.blocks] == blocks
    for skip in (*measured.singles, *measured.blocks):
        expected = torch.cat(without.losses(batches, skip.first, skip.last)).mean()
        assert skip.loss == pytest.approx(float(expected), rel=exact), skip
        assert skip.change == pytest.approx(float(expected - torch.cat(whole).mean()), abs=exact)


def test_the_lens_is_a_model_that_ends_early(
    trained: Trained, measured: Measured, batches: list[Batch], exact: float
) -> None:
    without = Without(trained)
    starts = [start for _, start in batches]
    final = torch.cat(
        [p[:, s:].flatten(0, 1) for p, s in zip(without.log_p(batches, 1, 0), starts, strict=True)]
    )
    for place, found in enumerate(measured.predictions):
        losses = torch.cat(without.losses(batches, place + 1, LAYERS))
        early = torch.cat(
            [
                p[:, s:].flatten(0, 1)
                for p, s in zip(without.log_p(batches, place + 1, LAYERS), starts, strict=True)
            ]
        )
        divergence = F.kl_div(early, final, log_target=True, reduction="batchmean")
        same = (early.argmax(-1) == final.argmax(-1)).double().mean()
        assert found.layer == place
        assert found.loss == pytest.approx(float(losses.mean()), rel=exact)
        assert found.divergence == pytest.approx(float(divergence), abs=exact)
        assert found.agreement == pytest.approx(float(same))
    assert measured.predictions[-1].loss == pytest.approx(measured.loss, rel=1e-14)
    assert (measured.predictions[-1].divergence, measured.predictions[-1].agreement) == (0.0, 1.0)


@pytest.mark.parametrize("scheme", ["b2t", "deepscalelm_pre_ln"])
def test_branches_and_cosines_are_those_of_the_equation(
    model: Callable[[str], Trained], batches: list[Batch], scheme: str
) -> None:
    """Over all tokens that are read, from the streams of the reference."""
    trained = model(scheme)
    parameters = {name: value.double() for name, value in trained.weights.items()}
    measured, epsilon = measure(in_fp64(trained), Plan.of(LAYERS), batches), trained.config.norm_epsilon
    shape = gpt.Shape(scheme, LAYERS, heads=2, eps=epsilon, logit_scale=trained.logit_scale)
    options = parts.Options(heads=2, eps=epsilon, activation="gelu")
    streams: list[Tensor] = []
    gpt.logits(parameters, shape, torch.cat([tokens for tokens, _ in batches])[:, :-1], streams)
    for index, found in enumerate(measured.layers):
        x = streams[index]
        if scheme == "b2t":
            w = gpt.layer_weights(parameters, index, shape, gpt.POST)
            attention, kept = parts.attention(x, w, options), x
            h = parts.norm(x + attention, w, "ln1", options)
            feed_forward, kept_by_mlp = parts.feed_forward(h, w, options), x + h
        else:
            lam, beta = deepscalelm.constants(LAYERS)
            w = gpt.layer_weights(parameters, index, shape, gpt.PRE)
            attention, kept = beta * parts.attention(parts.norm(x, w, "ln1", options), w, options), lam * x
            h = kept + attention
            feed_forward = beta * parts.feed_forward(parts.norm(h, w, "ln2", options), w, options)
            kept_by_mlp = lam * h
        assert found.attention_ratio == pytest.approx(float(attention.norm() / kept.norm()), rel=1e-10)
        assert found.mlp_ratio == pytest.approx(float(feed_forward.norm() / kept_by_mlp.norm()), rel=1e-10)
        cosine = F.cosine_similarity(x, streams[index + 1], dim=-1).mean()
        assert found.cosine == pytest.approx(float(cosine), abs=1e-6)


def test_branches_that_are_warmed_up_count_with_their_share(
    model: Callable[[str], Trained], batches: list[Batch]
) -> None:
    scorer, ratios = in_fp64(model("b2t")), []
    for share in (None, torch.tensor(0.5)):
        scorer.model.decoder.layers[0].self_attention_join.share = share
        ratios.append(measure(scorer, Plan.of(LAYERS, LAYERS), batches).layers[0].attention_ratio)
    assert ratios[1] == pytest.approx(ratios[0] / 2, rel=1e-12)


class Identity(nn.Module):
    """What stands in the model in place of a layer: the stream, in the units after it.

    Where the layer ends the stack with a norm, normed by it.
    """

    def __init__(self, layer: Any, *, ends: bool) -> None:
        super().__init__()
        self.norm = layer.mlp_output_norm if ends else nn.Identity()
        self.factor = layer.plan.entering / (layer.plan.mlp.joined if ends else layer.plan.leaving)

    def forward(self, hidden_states: Tensor, **unused: Any) -> tuple[Tensor, None]:
        return self.norm(hidden_states * self.factor), None


def test_a_walk_is_the_models_own_forward_pass_bit_by_bit(trained: Trained, batches: list[Batch]) -> None:
    """In fp32, although layers before a skip are not computed again."""
    scorer, tokens = Scorer(trained, "fp32"), batches[0][0]
    walk, layers = Walk(scorer.model), scorer.model.decoder.layers
    inputs, labels = scorer.inputs(tokens)
    with torch.no_grad():
        stream, angles = walk.enter({"tokens": inputs})
        for place in range(LAYERS):
            end = walk.run(walk.skip(stream, place, place + 1), place + 1, LAYERS, angles)
            found = -walk.log_probabilities(end, LAYERS).gather(2, labels[..., None]).squeeze(2)
            layer = layers[place]
            ends = place == LAYERS - 1 and scorer.model.decoder.final_layernorm is None
            layers[place] = Identity(layer, ends=ends)
            assert torch.equal(found, scorer.losses(tokens))
            layers[place] = layer
            stream = walk.run(stream, place, place + 1, angles)
        whole = -walk.log_probabilities(stream, LAYERS).gather(2, labels[..., None]).squeeze(2)
        assert torch.equal(whole, scorer.losses(tokens))


def test_what_it_costs_is_what_was_said(scorer: Scorer, batches: list[Batch]) -> None:
    calls: list[int] = []
    said: list[str] = []
    done: list[tuple[int, int]] = []
    handles = [
        layer.register_forward_hook(lambda *unused: calls.append(1)) for layer in scorer.model.decoder.layers
    ]
    plan = Plan.of(LAYERS, every=3)
    measure(scorer, plan, batches, say=said.append, progress=lambda *of: done.append(of))
    for handle in handles:
        handle.remove()
    # Two passes more over the first batch tell how long one takes.
    assert len(calls) == pytest.approx((2 * plan.passes + 2) * LAYERS)
    assert [start for start, _ in plan.singles] == [0, 3, 6, 8]
    assert said[0].startswith(
        "4 of 9 layers and 8 blocks are skipped in turn on 4 windows, as much work as 6 forward passes"
    )
    # Each of them is a block of its own, and is not skipped twice.
    assert (done[0], done[-1], len(done)) == ((1, 16), (16, 16), 16)


def test_a_thousand_layers_cost_fifty_passes() -> None:
    plan = Plan.of(1000)
    assert [start for start, _ in plan.singles] == [*range(0, 1000, 10), 999]
    assert [stop - start for start, stop in plan.blocks] == [125] * 8
    assert plan.passes == pytest.approx(2 + 50.4 + 3.5)
    assert len(Plan.of(100).singles) == 100
    assert Plan.of(1).blocks == ((0, 1),)
    with pytest.raises(UserError, match="--every 4: the model has 3 layers only"):
        Plan.of(3, 4)


def test_errors_are_those_of_a_mean_over_windows(scorer: Scorer, batches: list[Batch]) -> None:
    tokens = torch.cat([rows for rows, _ in batches])
    found = measure(scorer, Plan.of(LAYERS, LAYERS), [(tokens, 0)]).singles[0]
    each = [measure(scorer, Plan.of(LAYERS, LAYERS), [(row[None], 0)]).singles[0] for row in tokens]
    spread = torch.tensor([skip.change for skip in each], dtype=torch.float64).std()
    assert found.error == pytest.approx(float(spread) / math.sqrt(len(each)), rel=1e-9)
    assert all(isinstance(skip, Skip) and skip.error is None for skip in each)


def test_a_model_that_is_not_finite_is_refused(scorer: Scorer, batches: list[Batch]) -> None:
    norm = next(p for n, p in scorer.model.named_parameters() if n.endswith("layernorm.weight"))
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(math.nan)
    with pytest.raises(UserError, match="the loss of the whole model is not finite"):
        measure(scorer, Plan.of(LAYERS), batches)
    with torch.no_grad():
        norm.copy_(kept)
