"""Real layers, counted operator by operator, against formulas and hand counts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.cost.activations import Activations
from model.cost.flops import stack_flops
from model.cost.held import norms_of
from model.cost.operators import PARTIAL, Phase
from model.depth.schemes import SCHEMES
from pretrain.config.load import complete_model, load_config
from pretrain.plan.counted import BESIDE, Way, count_layer, layer_cost, layer_kinds
from tests.model.cost.test_activations import LLAMA
from tests.running import run, run_here

SEQ, SOURCE, WIDTH = 32, 16, 64
WAY = Way(SEQ)
PHASES: tuple[Phase, ...] = ("forward", "backward")
RANDOM_STATES = 24
"""Bytes that the flash kernel keeps for its dropout."""


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "scheme": "pre_ln",
            "num_layers": 6,
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_position_embeddings": SEQ,
            **changes,
        }
    )


OPERATORS = {
    "pre_ln": (10, 19, 12),
    "post_ln": (10, 19, 12),
    "b2t": (11, 20, 12),
    "deepscalelm_pre_ln": (10, 21, 12),
    "deepscalelm_post_ln": (10, 21, 12),
    "deepnorm": (10, 21, 12),
    "layernorm_scaling": (12, 21, 12),
    "peri_ln": (12, 21, 16),
    "mix_ln": (10, 19, 12),
    "spannorm": (10, 19, 12),
    "keel": (12, 23, 16),
    "gpas": (14, 26, 13),
    "hybridnorm": (12, 21, 16),
    "subln": (12, 21, 16),
}
"""Of the last layer, forward, backward, and sums of gradients, of which each parameter has one.

Forward: two norms, four products, attention, an activation, two joins. Backward: two products and
the sum over rows for each bias, one for each of the others, the gradient of queries, keys and
values put together, and a sum where two gradients of the stream meet.
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_operators_of_every_scheme(scheme: str) -> None:
    config = config_of(scheme=scheme)
    place = config.placed_layers()[-1]
    found = count_layer(config, place, WAY)
    host = found.host("forward"), found.host("backward"), found.host("accumulate")
    assert host == OPERATORS[scheme]
    a = Activations(config, 1, SEQ, element=2, fused=True)
    assert found.kept - RANDOM_STATES == a.layer(norms_of(place.plan))


JOINED = {
    **dict.fromkeys(SCHEMES, ((8, 17, 12), (8, 13, 4))),
    "b2t": ((8, 18, 12), (8, 14, 4)),
    "spannorm": ((8, 18, 12), (8, 14, 4)),
    "peri_ln": ((10, 21, 16), (10, 17, 10)),
    "keel": ((10, 21, 16), (10, 17, 8)),
    "gpas": ((8, 20, 13), (8, 13, 6)),
    "hybridnorm": ((11, 20, 16), (11, 17, 10)),
    "subln": ((9, 18, 16), (9, 14, 6)),
}
"""Of joined layers, and of those that add gradients to sums in products and passes."""


@pytest.mark.parametrize("scheme", JOINED)
def test_operators_of_joined_layers(scheme: str) -> None:
    """Forward: four products, attention, an activation, two joins.

    Backward: one for each of those and another for each weight; what puts attention's gradients
    together; and sums of the parts of vectors' gradients, for both joins, activation and heads.
    Where a norm's result is the residual too, its two gradients are added in the join's pass.
    The norm after an activation is in its pass.
    """
    config = config_of(scheme=scheme)
    place = config.placed_layers()[-2]
    a = Activations(config, 1, SEQ, element=2, fused=True, joined=True)
    for fused, expected in zip((False, True), JOINED[scheme], strict=True):
        found = count_layer(config, place, replace(WAY, joined=True, fused_sums=fused))
        host = found.host("forward"), found.host("backward"), found.host("accumulate")
        assert host == expected
        assert found.kept - RANDOM_STATES == a.layer(norms_of(place.plan))


STREAM = WIDTH * SEQ * 2
"""Bytes of a stream in 16 bits."""
INSIDE: dict[str, tuple[dict[str, Any], int]] = {
    # Read forward 4, backward 4 and 4, written backward 4: the gradient before the activation.
    "gelu": ({}, 12),
    # What a ReLU gives is the product's own result, of which there is no other.
    "relu": ({"activation": "relu"}, 16),
    # Of a width f forward 2 f are not read, backward neither f written nor read again.
    "swiglu": ({"activation": "swiglu", "ffn_hidden_size": 4 * WIDTH}, 16),
    "peri_ln": ({"scheme": "peri_ln"}, 12),
    "no biases": ({"bias": False}, 12),
}


@pytest.mark.parametrize("case", INSIDE)
def test_activations_inside_of_products_move_less(case: str) -> None:
    """And as much is computed and kept."""
    changes, streams = INSIDE[case]
    config = config_of(**changes)
    place, joined = config.placed_layers()[-2], replace(WAY, joined=True)
    apart, inside = (
        count_layer(config, place, replace(joined, fused_activation=fused)) for fused in (False, True)
    )
    assert inside.kept == apart.kept
    assert sum(one.flops for one in inside.operators) == sum(one.flops for one in apart.operators)
    for phase in ("forward", "backward"):
        assert inside.host(phase) == apart.host(phase) - 1
    moved = [
        sum(one.moved(phase, (*BESIDE, PARTIAL)) for phase in ("forward", "backward"))
        for one in (apart, inside)
    ]
    vectors = 3 * 8 * WIDTH * 2  # a bias of both halves is read three times, the fewer
    assert moved[0] - moved[1] == pytest.approx(streams * STREAM, abs=vectors)


SAVED = {
    "b2t": (0.26, 0.45),
    "gpas": (0.31, 0.49),
    "hybridnorm": (0.16, 0.33),
    "layernorm_scaling": (0.34, 0.52),
    "pre_ln": (0.25, 0.46),
    "subln": (0.40, 0.40),
}
"""Share of the bytes of element-wise work, rounded, as `docs/performance.md` has it.

By joined kernels, and with activations inside of products too.
"""


@pytest.mark.parametrize("scheme", SAVED)
def test_bytes_that_joined_layers_do_not_move(scheme: str) -> None:
    config = config_of(scheme=scheme, hidden_size=512, num_attention_heads=8, max_position_embeddings=2048)
    place = config.placed_layers()[-2]
    apart, *others = (
        sum(
            count_layer(config, place, Way(2048, samples=8, joined=one, fused_activation=inside)).moved(phase)
            for phase in PHASES
        )
        for one, inside in ((False, False), (True, False), (True, True))
    )
    assert tuple(round(1 - moved / apart, 2) for moved in others) == SAVED[scheme]


def test_partial_sums_that_go_into_sums_are_counted_once() -> None:
    config = config_of()
    stack = config.placed_layers()[0].stack
    apart, added = (
        layer_cost(config, stack, replace(WAY, joined=True, fused_sums=fused)) for fused in (False, True)
    )
    assert apart.fixed < added.fixed  # what is added to is read too, in fp32
    assert apart.accumulated > 10
    assert added.accumulated < 0.01  # that of the first layer's first norm, which stays apart


FUSED = {
    # With biases, and without: only those branches can end in the residual.
    "pre_ln": ((10, 19, 8), (8, 15, 4)),
    "b2t": ((11, 20, 8), (10, 16, 4)),
    "deepscalelm_pre_ln": ((10, 21, 8), (8, 15, 4)),
    "peri_ln": ((12, 21, 12), (12, 17, 8)),
    "gpas": ((14, 26, 9), (12, 22, 4 + 1)),
}
"""As `OPERATORS`, of layers whose products add gradients to sums, and branches to the residual."""


@pytest.mark.parametrize("scheme", FUSED)
def test_products_that_add_leave_the_addition_out(scheme: str) -> None:
    """And keep what is kept without, and compute as much."""
    for bias, host in zip((True, False), FUSED[scheme], strict=True):
        config = config_of(scheme=scheme, bias=bias)
        place = config.placed_layers()[-1]
        apart = count_layer(config, place, WAY)
        found = count_layer(config, place, replace(WAY, fused_sums=True, fused_residual=not bias))
        assert (found.host("forward"), found.host("backward"), found.host("accumulate")) == host
        assert found.kept == apart.kept
        assert sum(one.flops for one in found.operators) == sum(one.flops for one in apart.operators)


def test_a_product_that_a_library_put_in_the_place_of_pytorchs_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an engine of ZeRO-3 does in its process."""
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    test_operators_of_every_scheme("pre_ln")
    assert F.linear is zero3_linear_wrap


ROTARY = {4: (18, 23, 6), 2: (19, 23, 6), 1: (18, 23, 6)}
"""By key/value heads. Four operators forward turn queries, and four keys."""


@pytest.mark.parametrize("groups", ROTARY)
def test_operators_of_layers_that_turn_queries_and_keys(groups: int) -> None:
    config = config_of(**LLAMA | {"num_query_groups": groups, "activation": "gelu"})
    found = count_layer(config, config.placed_layers()[0], WAY)
    host = found.host("forward"), found.host("backward"), found.host("accumulate")
    assert host == ROTARY[groups]


KEPT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "norms of queries and keys": ({**LLAMA, "attention": {"qk_norm": True}}, {}),
    "capped": ({"attention": {"soft_cap": 2.0}}, {}),
    "dropout": ({"hidden_dropout": 0.1, "attention_dropout": 0.1}, {}),
    "selective": ({}, {"selective": True}),
    "fp32": ({}, {"element": 4}),
    "samples": ({}, {"samples": 3}),
    "fp32 stream": ({"scheme": "deepscalelm_pre_ln"}, {"fp32_stream": True}),
    "joined, llama": (LLAMA, {"joined": True}),
    "joined, dropout": ({"hidden_dropout": 0.1, "attention_dropout": 0.1}, {"joined": True}),
    "joined, a norm after a gate": ({**LLAMA, "scheme": "subln"}, {"joined": True}),
    "joined, a norm after a ReLU": ({"scheme": "subln", "activation": "relu"}, {"joined": True}),
    "joined, a wide norm": ({"scheme": "subln", "ffn_hidden_size": 8200}, {"joined": True}),
    "joined, fp32 stream": ({"scheme": "peri_ln"}, {"joined": True, "fp32_stream": True}),
    "on a cpu": ({"normalization": "rmsnorm"}, {"element": 4, "device": "cpu"}),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_is_what_the_plan_says(case: str) -> None:
    changes, given = KEPT[case]
    config, way = config_of(**changes), replace(WAY, **given)
    place = config.placed_layers()[-1 - way.joined]  # the last one's norm is the one after all
    a = Activations(
        config,
        way.samples,
        SEQ,
        element=way.element,
        fused=way.device == "meta",
        fp32_stream=way.fp32_stream,
        joined=way.joined,
    )
    flash = way.device == "meta" and not way.selective and "soft_cap" not in str(changes)
    expected = a.layer(norms_of(place.plan), recomputed=way.selective)
    assert count_layer(config, place, way).kept - flash * RANDOM_STATES == expected


CROSSED = {"encoder_layers": 2, "max_source_positions": SOURCE}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": LLAMA,
    "bert": {"family": "bert"},
    "seq2seq": {"family": "seq2seq", **CROSSED},
    "speech": {
        "family": "speech",
        "position": "sinusoidal",
        "encoder_layers": 2,
        "max_position_embeddings": None,
        "speech": {"filters": 8, "channels": 16},
    },
    "vit": {
        "family": "vit",
        "tie_embeddings": False,
        "max_position_embeddings": None,
        "image": {"height": 8, "patch": 2},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_of_pytorchs_counter_and_of_the_formula(family: str) -> None:
    config = config_of(**FAMILIES[family])
    crossed = config.blueprint.crossed
    way = replace(WAY, source_length=SOURCE if crossed else None)
    for place in config.placed_layers():
        with FlopCounterMode(display=False) as counter:
            found = count_layer(config, place, way)
        own, last = config.of(place.stack), place.stack is config.blueprint.stacks[-1]
        length = SEQ if last else SOURCE
        linear, core, mlp = stack_flops(own, length, SOURCE if place.stack.cross else None, causal=False)
        # The backward pass of fused attention has five products for two: it computes scores again.
        expected = length * (3 * (linear + mlp) + 3.5 * core) / own.num_layers
        assert sum(one.flops for one in found.operators) == counter.get_total_flops() == expected


def cut_over_two(*, sequence_parallel: bool, fused: bool = False) -> tuple[list[str], dict[str, Any]]:
    """A configuration, and what `fathom plan --count` gives of its layers on two ranks."""
    overrides = [
        *("model.hidden_size=64", "model.num_attention_heads=4", "model.num_layers=2"),
        # Of the biases of cut products Megatron-core makes additions of their own.
        "model.bias=false",
        *("parallel.tensor=2", f"parallel.sequence_parallel={str(sequence_parallel).lower()}"),
        *("train.precision=bf16", "data.seq_length=32", "train.micro_batch_size=2"),
        f"train.gradient_accumulation_fusion={str(fused).lower()}",
    ]
    done = run("plan", "configs/quickstart.yaml", *overrides, "--count", "--json")
    (kind,) = json.loads(done.out)["kinds"]
    return overrides, kind


def test_a_layer_that_is_cut_over_ranks_moves_what_is_reckoned_from_a_whole_one() -> None:
    """And its products add gradients to sums where they are asked to."""
    for sequence_parallel in (False, True):
        overrides, kind = cut_over_two(sequence_parallel=sequence_parallel)
        config = complete_model(load_config("configs/quickstart.yaml", overrides), 512)
        cost = layer_cost(config, config.blueprint.stacks[-1], replace(WAY, samples=2))
        reckoned = cost.moved(2, 2, sequence_parallel=sequence_parallel)
        assert kind["moved"] == pytest.approx(reckoned, rel=0.005)
        assert kind["operators"]["messages"]["forward"] == 2 * (1 + sequence_parallel)
    _, fused = cut_over_two(sequence_parallel=True, fused=True)
    apart, found = (
        [sum(row[phase] for row in one["operators"].values()) for phase in ("backward", "accumulate")]
        for one in (kind, fused)
    )
    assert found == [apart[0], apart[1] - 4]


def test_layers_of_one_kind_are_counted_once() -> None:
    """The first layer of layernorm_scaling has no factor, that of mix_ln a norm after its sums."""
    for scheme, layers in (("layernorm_scaling", [1, 5]), ("mix_ln", [1, 5]), ("deepnorm", [6])):
        config = config_of(scheme=scheme)
        kinds = layer_kinds(config, WAY)
        assert sorted(len(kind.layers) for kind in kinds) == sorted(layers)
        mean = sum(kind.counted.host("forward") * len(kind.layers) for kind in kinds) / 6
        assert layer_cost(config, config.blueprint.stacks[-1], WAY).forward == pytest.approx(mean)


def test_partial_sums_do_not_grow_with_the_batch() -> None:
    """What is counted of two samples gives the bytes of eight."""
    config = config_of(hidden_size=512, max_position_embeddings=2048)
    two, eight = (Way(2048, samples=samples, joined=True) for samples in (2, 8))
    counted = sum(
        len(kind.layers) * (kind.counted.moved("forward") + kind.counted.moved("backward")) / 6
        for kind in layer_kinds(config, eight)
    )
    cost = layer_cost(config, config.blueprint.stacks[-1], two)
    assert cost.moved(8, 1, sequence_parallel=False) == pytest.approx(counted, rel=0.002)
    assert cost.fixed > 0.01 * counted


def test_cpu_and_gpu_have_the_same_operators() -> None:
    """Of real numbers on a CPU, and of none by what stands for a GPU's kernels."""
    config = config_of(hidden_dropout=0.0)
    place = config.placed_layers()[0]
    real, imagined = (
        [one.name.removesuffix("_for_cpu").replace("_for_cpu_", "_") for one in found.operators]
        for found in (count_layer(config, place, replace(WAY, device=name)) for name in ("cpu", "meta"))
    )
    assert real == imagined


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["train.kernels=te"], "not with train.kernels=te: set train.kernels=local"),
        (["--tokens", "1e9"], "--tokens has no effect with --count"),
        (["--top", "8"], "--top has no effect with --count"),
        (["--gpu", "h100"], "--gpu has no effect with --count"),
        (["parallel.tensor=3"], "model.num_attention_heads=4 is not divisible by parallel.tensor=3"),
        (["parallel.tensor=4096", "model.vocab_size=9"], "is not divisible by parallel.tensor=4096"),
        (["parallel.sequence_parallel=true"], "has no effect with parallel.tensor=1"),
        (["parallel.pipeline=77"], "parallel.pipeline=77 stages are more than model.num_layers="),
        (
            ["parallel.tensor=2", "parallel.sequence_parallel=true", "data.seq_length=63"],
            "data.seq_length=63 is not divisible by parallel.tensor=2",
        ),
    ],
)
def test_what_cannot_be_counted_is_one_line(given: list[str], words: str) -> None:
    done = run_here("plan", "configs/quickstart.yaml", "--count", *given)
    assert (done.code, done.wrong, done.err.count("\n")) == (2, "", 1)
    assert words in done.err


def test_layouts_of_more_gpus_than_there_are_can_be_counted() -> None:
    sizes = ["model.hidden_size=1024", "model.num_attention_heads=64", "model.num_layers=128"]
    layout = ["parallel.tensor=64", "parallel.pipeline=128", "parallel.overlap_grad_reduce=true"]
    # In a process of its own: other tests may have put this one in a world of one.
    done = run("plan", "configs/quickstart.yaml", "--count", "--json", *sizes, *layout)
    assert (done.code, json.loads(done.out)["tensor"]) == (0, 64)
