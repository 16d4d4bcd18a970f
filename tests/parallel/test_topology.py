"""The layout object: what it refuses, and what it tells Megatron-core and DeepSpeed."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import UserError
from parallel.topology import Topology, balanced_split, split_layout
from tests.distributed import Group, gather, launch, rebuild
from tests.documents.layouts import REFUSED, refusal_list, refusals_in
from tests.parallel.refusals import REFUSALS
from tests.parallel.refusing import Refusal, layout
from tests.parallel.training import given, run_config


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_refusal_names_the_key_and_a_way_out(refusal: Refusal) -> None:
    line = refusal.line()
    assert re.search(refusal.message, line), line
    assert "\n" not in line


def test_documented_refusals_are_what_users_read() -> None:
    assert refusals_in(REFUSED.read_text()) == refusal_list(), (
        "docs/measured/refusals.md is older than the refusals: python -m tests.documents.layouts refusals"
    )


def test_choices_offered_by_refusals_work() -> None:
    layout(4, {}, tensor=2)
    layout(4, {}, pipeline=4, pipeline_split=[2, 2, 1, 1])
    layout(6, {}, pipeline=6)
    layout(2, given(vocab_multiple=2, vocab_size=121), tensor=2)
    layout(2, {}, pipeline=2, virtual_stages=3)


def test_batches_that_the_schedule_cannot_cut() -> None:
    sequence = layout(2, {}, tensor=2, sequence_parallel=True)
    with pytest.raises(
        UserError, match=r"data.seq_length=15 is not divisible by parallel.tensor=2.*: use 16"
    ):
        sequence.check_batches(15, 1)
    sequence.check_batches(16, 1)
    interleaved = layout(2, {}, pipeline=2, virtual_stages=3)
    with pytest.raises(
        UserError,
        match=r"3 micro-batches per step and rank are not a multiple of "
        r"parallel.pipeline=2.*virtual_stages=1",
    ):
        interleaved.check_batches(16, 3)
    interleaved.check_batches(16, 4)
    layout(2, {}, pipeline=2).check_batches(15, 3)


def test_degrees() -> None:
    one = layout(8, {}, tensor=2, pipeline=2, zero=2)
    assert one.data == 2
    assert one.summary() == {"tp": 2, "pp": 2, "vp": 1, "cp": 1, "dp": 2, "zero": 2}


@pytest.mark.parametrize(("encoder", "decoder", "stages"), [(4, 4, 2), (4, 4, 3), (2, 7, 4), (6, 3, 5)])
def test_balanced_splits_are_the_best_of_all(encoder: int, decoder: int, stages: int) -> None:
    """The largest stage, then the squares of all, then more layers early, against every split."""
    model = ModelConfig.model_validate(
        {"family": "seq2seq", "num_layers": decoder, "encoder_layers": encoder}
        | {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 8}
    )
    costs = [2] * encoder + [3] * decoder

    def order(ends: tuple[int, ...]) -> tuple[int, int, list[int]]:
        parts = list(itertools.pairwise((0, *ends, len(costs))))
        sums = [sum(costs[start:end]) for start, end in parts]
        return max(sums), sum(value**2 for value in sums), [start - end for start, end in parts]

    best = min(itertools.combinations(range(1, len(costs)), stages - 1), key=order)
    wanted = tuple(end - start for start, end in itertools.pairwise((0, *best, len(costs))))
    assert balanced_split(model, stages) == wanted


def test_notation_of_uneven_splits() -> None:
    assert split_layout((3, 1)) == "Ettt|tL"
    assert split_layout((1, 2, 1)) == "Et|tt|tL"


def seen_by_rank() -> dict[str, Any]:
    """Runs inside a rank."""
    config = run_config(parallel=given(tensor=2, pipeline=2))
    topology = rebuild(config.parallel, config.model)
    tensor_first = {
        "ranks": (topology.tensor_rank, topology.pipeline_rank, topology.data_rank),
        "model_rank": topology.get_model_parallel_rank(),
        "model_world": topology.get_model_parallel_world_size(),
        "edges": (topology.first_stage, topology.last_stage),
        "ulysses": hasattr(topology, "initialize_sequence_parallel"),
        "core": topology.core_fields(),
    }
    config = run_config(parallel=given(context=2))
    topology = rebuild(config.parallel, config.model)
    cut = {
        "ranks": (topology.context_rank, topology.data_rank, topology.replica_rank),
        "replicas": topology.layout.replicas,
        "cut over": (topology.get_data_parallel_group_ranks(), topology.get_data_parallel_world_size()),
    }
    config = run_config(parallel=given(pipeline=2, virtual_stages=2))
    topology = rebuild(config.parallel, config.model)
    return tensor_first | {
        "cut": cut,
        "data": (
            topology.get_data_parallel_group_ranks(),
            topology.get_data_parallel_world_size(),
            topology.data_rank,
        ),
        "everyone": gather(topology.get_model_parallel_rank()),
        "interleaved": topology.core_fields(),
    }


def test_groups_and_what_deepspeed_asks() -> None:
    (ranks,) = launch(Group(4, seen_by_rank))
    assert [one["ranks"] for one in ranks] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [one["model_rank"] for one in ranks] == [0, 1, 2, 3]
    assert {one["model_world"] for one in ranks} == {4}
    assert [one["edges"] for one in ranks] == [(True, False)] * 2 + [(False, True)] * 2
    # DeepSpeed would take an mpu with this method for Ulysses.
    assert not any(one["ulysses"] for one in ranks)
    assert [one["data"] for one in ranks] == [([0, 1], 2, 0), ([0, 1], 2, 1), ([2, 3], 2, 0), ([2, 3], 2, 1)]
    assert ranks[0]["everyone"] == [0, 0, 1, 1]
    # Ranks with pieces of the same samples are replicas too, to DeepSpeed.
    assert [one["cut"]["ranks"] for one in ranks] == [(0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)]
    assert all(one["cut"]["replicas"] == 4 for one in ranks)
    assert all(one["cut"]["cut over"] == ([0, 1, 2, 3], 4) for one in ranks)
    plain, interleaved = ranks[0]["core"], ranks[0]["interleaved"]
    assert (
        plain["overlap_p2p_comm"],
        plain["batch_p2p_comm"],
        plain["virtual_pipeline_model_parallel_size"],
    ) == (False, True, None)
    # Batched messages between two interleaved stages are swapped and give wrong gradients.
    assert (
        interleaved["overlap_p2p_comm"],
        interleaved["batch_p2p_comm"],
        interleaved["virtual_pipeline_model_parallel_size"],
    ) == (True, False, 2)


def test_topology_refuses_other_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = Topology.__new__(Topology).anything
