"""Masked language modelling under every kind of layout is that of one process.

Samples have different numbers of labels, so that ranks and micro-batches do too.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from model.network.losses import likeliest
from parallel.engine.engine import Engine
from pretrain.tasks.masked_lm import MASKED_LM
from pretrain.tasks.task import Batch
from tests.distributed import Group, launch
from tests.parallel.layouts import FULL, SP
from tests.parallel.task_layouts import Layout, assert_same, measured, outcome
from tests.parallel.training import (
    ENCODER,
    MASKED_LABELS,
    PLACES,
    VOCAB_SIZE,
    batches_of,
    engine_of,
    given,
    run_config,
)

STEPS, GLOBAL = 3, 8
# Logits start from the labels' frequencies, so that many labels are the likeliest.
BASE = given(family="bert", num_layers=4, init=given(unigram=True))
MODELS = {
    "post": BASE | ENCODER | given(window=3, global_every=3),
    "pre": BASE
    | given(
        scheme="b2t",
        position="rotary",
        tie_embeddings=False,
        plain_head=True,
        logit_bias=True,
        window=4,
        global_every=2,
        rotary_base_local=100,
    ),
}
LAYOUTS: dict[str, Layout] = {
    "TP2 x PP2 + SP": (4, given(tensor=2, pipeline=2, sequence_parallel=True), "post"),
    "TP2, PP2, selective recomputation": (
        4,
        given(tensor=2, pipeline=2, recompute=given(granularity="selective")),
        "pre",
    ),
    "TP2 + SP, full recomputation": (2, SP | FULL, "pre"),
    "PP2 interleaved": (2, given(pipeline=2, virtual_stages=2), "post"),
    "DP4, ZeRO-2": (4, given(zero=2), "post"),
    "DP2, ZeRO-3": (2, given(zero=3), "pre"),
}


def train(model: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any] | None:
    """Inside ranks: what some steps and an evaluation give, from rank 0."""
    # A larger epsilon: gradients that are zero but for rounding, as of keys' biases, move nothing.
    config = run_config(model, layout, eps=1e-3)
    log_p_v = torch.full((VOCAB_SIZE,), -9.0)
    log_p_v[MASKED_LABELS] = 0.0
    engine = engine_of(config, log_p_v.log_softmax(0))
    engine.set_lr(1e-3)
    held_out = batches_of(config, engine, STEPS)
    found = outcome(engine, MASKED_LM, functools.partial(batches_of, config, engine), held_out, STEPS)
    if torch.distributed.get_world_size() == 1:
        found["hits"] = hits_by_logits(engine, held_out)
    return found if torch.distributed.get_rank() == 0 else None


def hits_by_logits(engine: Engine, given_batches: list[Batch]) -> float:
    """Labels that are the likeliest token, from whole logits."""
    (chunk,), hits = engine.chunks, 0.0
    for batch in given_batches:
        inputs = {
            name: tensor for name, tensor in batch.items() if name not in ("labels", "weights", "share")
        }
        best = chunk.eval()(inputs)[..., :VOCAB_SIZE].argmax(-1)
        hits += float(((best == batch["labels"]) * batch["weights"]).sum())
    return hits


def likeliest_of_equals() -> list[list[int]]:
    """Inside two ranks: the likeliest of four columns each, where logits are equal, and where only
    some columns are tokens.
    """
    rank, group = torch.distributed.get_rank(), torch.distributed.group.WORLD
    equal, rising = torch.zeros(1, 2, 4), torch.arange(4.0).expand(1, 2, 4) + 4 * rank
    cases = [(equal, 8), (rising, 8), (rising, 6), (rising, 3)]
    return [likeliest(logits, vocab, group)[0].tolist() for logits, vocab in cases]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measured(train, MODELS, LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_and_evaluates_as_one_process(name: str, found: dict[str, Any]) -> None:
    assert_same(found[name], found[LAYOUTS[name][2]])


def test_an_evaluation_counts_every_label(found: dict[str, Any]) -> None:
    """Micro-batches have other numbers of them."""
    assert found["post"]["sums"][-1] == sum(
        index % (PLACES + 1) for index in range(STEPS * GLOBAL, (STEPS + 1) * GLOBAL)
    )


@pytest.mark.parametrize("name", MODELS)
def test_hits_are_labels_with_the_largest_logit(name: str, found: dict[str, Any]) -> None:
    _, hits, labels = found[name]["sums"]
    assert hits == found[name]["hits"]
    assert 0 < hits < labels


def test_the_likeliest_token_is_the_same_on_all_ranks_and_never_padding() -> None:
    (ranks,) = launch(Group(2, likeliest_of_equals, ()))
    assert ranks == [[[0, 0], [7, 7], [5, 5], [2, 2]]] * 2
