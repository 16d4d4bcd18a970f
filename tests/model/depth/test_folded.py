"""Plans in computed units multiply nothing of the stream, and give the scheme's function."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.depth.folded import RANGE, folded
from model.depth.plan import DepthPlan
from model.depth.scheme import Depth, Scheme
from model.depth.schemes import SCHEMES
from model.depth.sublayer import Layer, Sublayer
from model.hf.reference import Evaluation
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from parallel.launch.one_process import single_process

SEQ, VOCAB = 6, 32
SCALE = st.sampled_from([0.0, 1.0, 0.3, -0.7, 2.5, 1e-7])


def test_no_scheme_multiplies_its_stream() -> None:
    for scheme, depth in itertools.product(SCHEMES, (1, 7, 48, 1000)):
        plan = DepthPlan.of(scheme, depth)
        for layer in plan.folded():
            for part in (layer.attention, layer.mlp):
                assert part.residual_scale in (0.0, 1.0)
                assert part.skip_scale in (0.0, 1.0)


def test_units_of_deepscale() -> None:
    """c_j = lambda^j, and lambda^(2N) is about e^(-k/2)."""
    plan = folded(SCHEMES["deepscalelm_pre_ln"].plan(1000))
    lam, beta = math.sqrt(1 - 1 / 1000), math.sqrt(1 / 1000)
    assert plan[0].attention.joined == pytest.approx(lam, rel=1e-14)
    assert plan[499].entering == pytest.approx(lam**998, rel=1e-12)
    assert plan[-1].leaving == pytest.approx(math.exp(-1), rel=1e-3)
    assert plan[-1].mlp.branch_scale == pytest.approx(beta / lam**2000, rel=1e-12)
    assert plan[499].attention.epsilon_in(1e-5) == pytest.approx(1e-5 / lam**1996, rel=1e-12)


def test_units_of_a_post_norm_scheme() -> None:
    """LN_e(a x + F) = LN_(e / a^2)(x + F / a)."""
    plan, a = folded(SCHEMES["deepnorm"].plan(8)), 2.0
    for layer in plan:
        assert (layer.entering, layer.attention.leaving, layer.leaving) == (1.0, a, 1.0)
        assert layer.attention.branch_scale == layer.mlp.branch_scale == 1 / a
        assert layer.mlp.epsilon_in(1e-5) == layer.mlp.epsilon_out(1e-5) == 1e-5 / a**2


@pytest.mark.parametrize("k", [1990.0, 2000.0])
def test_units_stay_in_range(k: float) -> None:
    """lambda^(2N) underflows here: the stream is multiplied by powers of two, or not at all."""
    plan = folded(SCHEMES["deepscalelm_pre_ln"].plan(1000, {"k": k}))
    for layer in plan:
        for part in (layer.attention, layer.mlp):
            assert 1 / RANGE <= part.joined <= RANGE
            assert part.residual_scale == 0 or math.log2(part.residual_scale) % 16 == 0


def sublayers() -> st.SearchStrategy[Sublayer]:
    def make(norms: tuple[bool, ...], scales: tuple[float, ...]) -> Sublayer:
        norm_in, norm_branch, norm_out, from_norm = norms
        before, branch, residual, skip = scales
        return Sublayer(norm_in, norm_branch, norm_out, norm_in and from_norm, before, branch, residual, skip)

    return st.builds(make, st.tuples(*[st.booleans()] * 4), st.tuples(*[SCALE] * 4))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(st.builds(Layer, sublayers(), sublayers()), min_size=3, max_size=3),
    final_norm=st.booleans(),
    normalization=st.sampled_from(["layernorm", "rmsnorm"]),
)
def test_any_plan_computes_its_equation(
    monkeypatch: pytest.MonkeyPatch, layers: list[Layer], final_norm: bool, normalization: str
) -> None:
    """In fp64 against the plain evaluation of the scheme's equation.

    The epsilon is large enough to be felt.
    """

    def layer(depth: Depth) -> Layer:
        return layers[depth.number - 1]

    monkeypatch.setitem(SCHEMES, "any", Scheme("any", "", "", layer, final_norm=final_norm))
    ours, theirs = both("any", normalization=normalization, num_layers=3)
    # Plans with tiny factors take differences of streams of size one, which have absolute errors.
    size = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * size + 1e-14)


@pytest.mark.parametrize("k", [2.0, 398.0])
def test_extreme_options_compute_their_equation(k: float) -> None:
    torch.testing.assert_close(
        *both("deepscalelm_pre_ln", scheme_options={"k": k}, num_layers=200), rtol=1e-8, atol=1e-8
    )


def both(scheme: str, **model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model and of the plain evaluation, fp64, same random weights."""
    single_process()
    config = ModelConfig(
        scheme=scheme,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=VOCAB,
        vocab_multiple=1,
        max_position_embeddings=SEQ,
        norm_epsilon=0.05,
        **model,
    )
    chunk = (
        LanguageModel(config, transformer_config(config, dtype=torch.float64), seq_length=SEQ).double().eval()
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
    weights = {one.name: one.parameter.detach() for one in named_parameters(chunk, 0, 1)}
    tokens = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    with torch.no_grad():
        ours = chunk({"tokens": tokens})
    scale = chunk.logit_scale / (1.0 if SCHEMES[scheme].final_norm else chunk.plan[-1].leaving)
    return ours, Evaluation(weights, config, logit_scale=scale, dtype=torch.float64)(tokens)
