"""The plain evaluation against the references of the depth schemes, and its generation."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from transformers.activations import ACT2FN

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.hf.folding.obstacles import LLAMA_ACTIVATIONS, UNGATED_ACTIVATIONS
from model.hf.reference import ACTIVATIONS, Cache, Evaluation, generate, pick
from model.hf.remote import modeling_fathom
from model.layers import transformer_config
from model.theory import correlation
from tests.model.hf.tiny import LOGIT_SCALE, make_config, make_tokens, make_weights, reference

VARIANTS = [
    {
        "num_query_groups": 2,
        "normalization": "rmsnorm",
        "position": "rotary",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
    {"head_dim": 12, "activation": "geglu", "norm_epsilon": 1e-3},
    {
        "num_query_groups": 1,
        "position": "rotary",
        "rotary_base": 500,
        "activation": "gelu_tanh",
        "window": 2,
        "global_every": 3,
        "rotary_base_local": 100,
    },
    {
        "normalization": "rmsnorm",
        "position": "none",
        "activation": "silu",
        "tie_embeddings": False,
        "window": 3,
    },
    {
        "position": "rotary",
        "rotary": {
            "scaling": "yarn",
            "factor": 4.0,
            "original_positions": 20,
            "beta_fast": 3.0,
            "share": 0.5,
        },
        "window": 2,
        "global_every": 3,
        "rotary_base_local": 100,
        "attention": {"soft_cap": 0.5, "qkv_bias": True},
        "bias": False,
        "logit_soft_cap": 1.5,
    },
]


@pytest.mark.parametrize(("scheme", "variant"), list(itertools.product(SCHEMES, range(len(VARIANTS)))))
def test_equals_the_reference(scheme: str, variant: int) -> None:
    config = make_config(scheme, **VARIANTS[variant])
    weights, tokens = make_weights(config), make_tokens(config)
    ours = Evaluation(weights, config, logit_scale=LOGIT_SCALE, dtype=torch.float64)(tokens)
    expected = reference(config, weights, dtype=torch.float64)(tokens)
    assert ours.shape == (2, 16, 101)
    torch.testing.assert_close(ours, expected[..., :101], rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoding_step_by_step_equals_the_whole_sequence(scheme: str) -> None:
    config = make_config(scheme, num_query_groups=2, position="rotary" if scheme == "b2t" else "learned")
    tokens, cache = make_tokens(config), Cache()
    evaluation = Evaluation(make_weights(config), config, logit_scale=LOGIT_SCALE, dtype=torch.float64)
    pieces = [evaluation(part, cache) for part in tokens.split([7, 1, 3, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), evaluation(tokens), rtol=0, atol=1e-9)


def test_greedy_generation_picks_the_largest_logit_each_time() -> None:
    config = make_config("b2t")
    weights, ids = make_weights(config), [3, 1, 4]
    new = list(generate(weights, config, ids, 8, temperature=0, logit_scale=LOGIT_SCALE))
    for _ in range(8):
        ids.append(int(reference(config, weights)(torch.tensor([ids]))[0, -1, :101].argmax()))
    assert new == ids[3:]


def test_generation_repeats_with_a_seed_and_stops_at_the_stop_token() -> None:
    config = make_config()
    weights = make_weights(config)
    runs = [
        list(generate(weights, config, [5], 12, top_k=50, seed=seed, logit_scale=LOGIT_SCALE))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    stop = runs[0][4]
    assert (
        list(generate(weights, config, [5], 12, top_k=50, seed=1, logit_scale=LOGIT_SCALE, stop_id=stop))
        == runs[0][: runs[0].index(stop) + 1]
    )


def test_top_k_and_top_p_cut_where_they_should() -> None:
    logits, generator = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)

    def seen(**cut: float) -> set[int]:
        arguments = {"temperature": 1.0, "top_k": None, "top_p": None, **cut}
        return {pick(logits, generator=generator, **arguments) for _ in range(300)}  # type: ignore[arg-type]

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.79) == {0, 1}
    assert seen(top_p=0.81) == {0, 1, 2}
    assert seen(top_p=0.01) == seen(temperature=0) == {0}


@pytest.mark.parametrize(
    ("ids", "arguments", "reason"),
    [
        ([], {}, "empty"),
        ([101], {}, "outside the vocabulary of 101"),
        ([1], {"temperature": -1.0}, "--temperature -1.0"),
        ([1], {"top_k": 0}, "--top-k 0"),
        ([1], {"top_p": 1.5}, "--top-p 1.5"),
    ],
)
def test_refuses_bad_settings_before_the_first_token(
    ids: list[int], arguments: dict[str, float], reason: str
) -> None:
    config = make_config()
    with pytest.raises(UserError, match=reason):
        generate(make_weights(config), config, ids, 4, logit_scale=1.0, **arguments)  # type: ignore[arg-type]


def test_says_when_the_learned_positions_end() -> None:
    config = make_config()
    with pytest.raises(UserError, match="learned only 24"):
        list(generate(make_weights(config), config, [1], 100, logit_scale=1.0))


def test_reads_weights_one_at_a_time() -> None:
    config = make_config()
    weights, alive, most = make_weights(config), [0], [0]

    class Lazy(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            import weakref

            tensor = super().__getitem__(name).clone()
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - 1))
            return tensor

    Evaluation(Lazy(weights), config, logit_scale=1.0)(make_tokens(config))
    assert 1 <= most[0] <= 3


def test_all_tables_have_every_activation() -> None:
    names = set(get_args(ModelConfig.model_fields["activation"].annotation))
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    tables: list[dict[str, Any]] = [ACTIVATIONS, modeling_fathom.ACTIVATIONS, transformer_config.ACTIVATIONS]
    for table in tables:
        assert set(table) == names
        for name in names:
            torch.testing.assert_close(table[name](x), ACTIVATIONS[name](x), rtol=0, atol=1e-14)
    assert {*correlation.POINTWISE, *correlation.GATES} == names
    gated = {name for name in names if make_config(activation=name).gated}
    assert set(modeling_fathom.GATED) == set(LLAMA_ACTIVATIONS) == set(correlation.GATES) == gated
    assert set(UNGATED_ACTIVATIONS) == names - gated
    for name, theirs in (UNGATED_ACTIVATIONS | LLAMA_ACTIVATIONS).items():
        torch.testing.assert_close(ACT2FN[theirs](x), ACTIVATIONS[name](x), rtol=0, atol=1e-14)
