"""CompleteP against its table, and at base sizes against the run without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.parameters.table import parameter_table
from model.weights.init import logit_scale, standard_deviations
from parallel.factors import ONE, Factors
from pretrain.config.sections.factors import FactorsConfig, factors_of
from tests.parallel.training import run_config, train
from tests.reference.completep import multipliers

WIDTH, DEPTH, HEADS = 32, 4, 4
TRANSFER = {"method": "completep", "base_layers": DEPTH, "base_hidden": WIDTH}
OPTIONS: dict[str, dict[str, Any]] = {"post_ln": {"branch": 1.0}, "b2t": {"branch": 2.0}}
KNOWN = [scheme.name for scheme in SCHEMES.values() if scheme.transfer]
BASES = ["scheme", "normal", "xavier", "fairseq"]


def _config(m_n: int = 1, m_l: int = 1, **changes: Any) -> ModelConfig:
    scheme = changes.get("scheme", "pre_ln")
    base: dict[str, Any] = {
        "scheme": scheme,
        "scheme_options": OPTIONS.get(scheme, {}),
        "num_layers": DEPTH * m_l,
        "hidden_size": WIDTH * m_n,
        "num_attention_heads": HEADS * m_n,
        "vocab_size": 120,
        "max_position_embeddings": 16,
    }
    return ModelConfig.model_validate(base | changes)


@pytest.mark.parametrize("scheme", KNOWN)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_branches_shrink_from_what_they_are_at_the_base(scheme: str, alpha: float) -> None:
    base = _config(scheme=scheme).depth_plan().layers[-1]
    deep = _config(1, 4, scheme=scheme, transfer=TRANSFER | {"alpha": alpha}).depth_plan().layers[-1]
    factor = multipliers(1, 4, alpha).branch
    for ours, theirs in ((deep.attention, base.attention), (deep.mlp, base.mlp)):
        assert ours.branch_scale == pytest.approx(theirs.branch_scale * factor, rel=1e-15)
        if scheme.startswith("deepscalelm"):
            assert ours.residual_scale**2 + ours.branch_scale**2 == pytest.approx(1, rel=1e-15)
        else:
            assert ours.residual_scale == theirs.residual_scale
    # Post-norm branches of c / N follow that rule by themselves.
    if alpha == 1 and scheme in OPTIONS:
        plain = _config(1, 4, scheme=scheme).depth_plan().layers[-1].mlp
        assert deep.mlp.branch_scale == pytest.approx(plain.branch_scale, rel=1e-15)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_logits_follow_the_table(base: str, tied: bool) -> None:
    changes: dict[str, Any] = {"init": {"base": base}, "tie_embeddings": tied}
    small, large = _config(**changes), _config(4, 8, transfer=TRANSFER, **changes)
    given, found = standard_deviations(small, 16), standard_deviations(large, 16)
    table = multipliers(4, 8, 1.0)
    for role, std in given.layers[0].items():
        assert found.layers[0][role] ** 2 == pytest.approx(std**2 * table.hidden_variance, rel=1e-12), role
        assert found.layers[-1][role] == pytest.approx(found.layers[0][role], rel=1e-12), "depends on depth"
    assert (found.word, found.position, found.output) == (given.word, given.position, given.output)
    assert logit_scale(large) == pytest.approx(logit_scale(small) * table.output, rel=1e-15)


@pytest.mark.parametrize("alpha", [1.0, 0.75])
def test_rates_epsilons_and_decay_follow_the_table(alpha: float) -> None:
    config = _config(4, 8, transfer=TRANSFER | {"alpha": alpha}, tie_embeddings=False, logit_bias=True)
    own = FactorsConfig.model_validate({"hidden": {"rate": 3.0}, "embedding": {"rate": 5.0}})
    of = factors_of(own, config)
    table = multipliers(4, 8, alpha)
    hidden = Factors(3 * table.hidden_rate, table.layer_eps, table.hidden_decay)
    for row in parameter_table(config):
        found = of(row)
        expected = Factors(1.0, table.outer_eps, 1.0)
        if row.name == "output_layer.bias":
            expected = ONE
        elif row.stack == "embedding":
            expected = Factors(5.0, table.outer_eps, 1.0)
        elif row.layer is not None:
            matrix = row.leaf == "weight" and "norm" not in row.name
            expected = hidden if matrix else Factors(table.vector_rate, table.layer_eps, 1.0)
        for ours, theirs in ((found.rate, expected.rate), (found.eps, expected.eps)):
            assert ours == pytest.approx(theirs, rel=1e-14), row.name
        assert found.decay == pytest.approx(expected.decay, rel=1e-14), row.name


CROSSED: dict[str, Any] = {"family": "seq2seq", "max_source_positions": 16}
DEPTHS = {"encoder": (3, 6), "decoder": (2, 8)}
"""Layers of the base and of the model."""


@pytest.mark.parametrize("scheme", KNOWN)
@pytest.mark.parametrize("base", ["scheme", "normal"])
def test_each_of_two_stacks_follows_its_own_depth(scheme: str, base: str) -> None:
    small, large = (
        _config(
            (1, 2)[at],
            scheme=scheme,
            init={"base": base},
            **CROSSED,
            encoder_layers=DEPTHS["encoder"][at],
            num_layers=DEPTHS["decoder"][at],
            transfer=given,
        )
        for at, given in enumerate(
            (
                {},
                {
                    "method": "completep",
                    "base_hidden": WIDTH,
                    "base_layers": DEPTHS["decoder"][0],
                    "base_encoder_layers": DEPTHS["encoder"][0],
                    "alpha": 0.75,
                },
            )
        )
    )
    tables = {name: multipliers(2, deep / shallow, 0.75) for name, (shallow, deep) in DEPTHS.items()}
    stds = [iter(standard_deviations(one, 16, 16).layers) for one in (small, large)]
    for stack in large.blueprint.stacks:
        before, after = small.stack_plan(stack), large.stack_plan(stack)
        for kind in after.kinds:
            ours, theirs = (getattr(plan.layers[-1], kind) for plan in (after, before))
            factor = tables[stack.name].branch
            assert ours.branch_scale == pytest.approx(theirs.branch_scale * factor, rel=1e-15), kind
        found = [[next(one) for _ in plan.layers] for one, plan in zip(stds, (before, after), strict=True)]
        # Of weights that follow the correlation of tokens only sizes are the base's.
        for role, std in found[0][0].items() if base == "normal" else ():
            assert found[1][-1][role] ** 2 == pytest.approx(std**2 / 2, rel=1e-12), role
    of = factors_of(FactorsConfig(), large)
    for row in parameter_table(large):
        if row.layer is None:
            assert of(row) == Factors(1.0, 1 / 2, 1.0), row.name
            continue
        table = tables[row.stack]
        matrix = row.leaf == "weight" and "norm" not in row.name
        expected = (table.hidden_rate, table.hidden_decay) if matrix else (table.vector_rate, 1.0)
        assert (of(row).rate, of(row).decay) == pytest.approx(expected, rel=1e-14), row.name
        assert of(row).eps == pytest.approx(table.layer_eps, rel=1e-14), row.name


def test_an_encoder_without_a_base_of_its_own_has_the_decoders() -> None:
    config = _config(1, 4, **CROSSED, encoder_layers=8, transfer=TRANSFER)
    assert [config.of(stack).deeper for stack in config.blueprint.stacks] == [2, 4]


def test_scores_are_divided_by_the_width_of_a_head() -> None:
    one = _config(transfer={"method": "completep", "base_head_dim": 2})
    assert one.kv_channels == 8
    assert one.score_scale / math.sqrt(8) == pytest.approx(math.sqrt(2) / 8, rel=1e-15)


@pytest.mark.parametrize("scheme", KNOWN)
@pytest.mark.parametrize("base", ["scheme", "normal"])
def test_at_the_base_nothing_changes(scheme: str, base: str) -> None:
    plain = _config(scheme=scheme, init={"base": base})
    at_base = plain.model_copy(
        update={"transfer": _config(transfer=TRANSFER | {"base_head_dim": WIDTH // HEADS}).transfer}
    )
    assert at_base.depth_plan() == plain.depth_plan()
    assert standard_deviations(at_base, 16) == standard_deviations(plain, 16)
    assert at_base.score_scale == 1.0
    of = factors_of(FactorsConfig(), at_base)
    assert {of(row) for row in parameter_table(at_base)} == {ONE}


def test_a_training_at_the_base_is_the_same_bit_for_bit() -> None:
    from parallel.launch.one_process import single_process
    from pretrain.train.build import build_engine

    curves = []
    for transfer in ({}, TRANSFER):
        config = run_config({"transfer": transfer, "scheme": "pre_ln"})
        engine = build_engine(config, single_process())
        curves.append(train(config, engine, 0, 3))
    assert (curves[0].losses, curves[0].norms) == (curves[1].losses, curves[1].norms)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"scheme": "keel"},
            r"method=completep has no rule for model.scheme=keel: set it to none, or choose",
        ),
        (
            {"scheme_options": {}, "scheme": "post_ln"},
            r"no rule for model.scheme=post_ln without model.scheme_options.branch: give that",
        ),
        (
            {"scheme": "deepscalelm_pre_ln", "transfer": TRANSFER | {"base_layers": 400}},
            "base_layers gives branches a factor of 5, and more than 1 leaves no residual",
        ),
        ({"transfer": {"method": "completep"}}, "has no effect without a base"),
        (
            {"transfer": {"method": "completep", "base_encoder_layers": 2}},
            "base_encoder_layers=2 has no effect with model.family=gpt, which has one stack",
        ),
        ({"transfer": {"base_layers": 4}}, r"base_layers=4 has no effect with model.transfer.method=none"),
        (
            {"transfer": {"method": "completep", "base_hidden": 8, "alpha": 0.5}},
            "alpha=0.5 has no effect without model.transfer.base_layers",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        _config(**{"transfer": TRANSFER, **changes})


def test_muon_has_other_rates() -> None:
    with pytest.raises(ValidationError, match=r"method=completep does not combine with optimizer.kind=muon"):
        run_config({"transfer": TRANSFER, "scheme": "pre_ln"}, kind="muon")
