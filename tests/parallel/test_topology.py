"""The layout object: what it refuses, and what it tells Megatron-core and DeepSpeed."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import UserError
from parallel.config import ParallelConfig
from parallel.topology import Layout, Topology, check_layout, split_layout
from tests.distributed import Group, gather, launch, rebuild
from tests.parallel.training import given, run_config

MODEL = given(num_layers=6, hidden_size=32, num_attention_heads=4, vocab_size=120)


def layout(world: int, model: dict[str, Any] | None = None, **parallel: Any) -> Layout:
    return check_layout(ParallelConfig(**parallel), ModelConfig(**(MODEL | (model or {}))), world)


REFUSED: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "world": (3, {}, given(tensor=2), "tensor x pipeline x context = 2 x 1 x 1 = 2 does not divide 3 processes: use parallel.processes=4 or smaller degrees"),
    "world too small": (1, {}, given(tensor=2, pipeline=2), "= 4 does not divide 1 processes: use parallel.processes=4"),
    "heads": (8, given(num_query_groups=1), given(tensor=8), "model.num_attention_heads=4 is not divisible by parallel.tensor=8"),
    "groups": (4, given(num_query_groups=2), given(tensor=4), "model.num_query_groups=2 is not divisible by parallel.tensor=4"),
    "ffn": (2, given(ffn_hidden_size=33), given(tensor=2), "model.ffn_hidden_size=33 is not divisible by parallel.tensor=2"),
    "vocabulary": (2, given(vocab_multiple=1, vocab_size=121), given(tensor=2), "model.vocab_multiple=1 .* set model.vocab_multiple=2"),
    "sequence parallel alone": (1, {}, given(sequence_parallel=True), "sequence_parallel=true has no effect with parallel.tensor=1"),
    "uneven layers": (4, {}, given(pipeline=4), r"model.num_layers=6 is not divisible by parallel.pipeline=4: set parallel.pipeline_split=\[2, 2, 1, 1\]"),
    "more stages than layers": (8, {}, given(pipeline=8), "parallel.pipeline=8 stages are more than model.num_layers=6: use parallel.pipeline=6 or less"),
    "split count": (2, {}, given(pipeline=2, pipeline_split=[6]), "must have 2 positive entries .* that sum to model.num_layers=6"),
    "split sum": (2, {}, given(pipeline=2, pipeline_split=[3, 4]), r"pipeline_split=\[3, 4\] must have 2 positive entries"),
    "split of nothing": (2, {}, given(pipeline=2, pipeline_split=[6, 0]), "positive entries"),
    "split and virtual": (2, {}, given(pipeline=2, pipeline_split=[4, 2], virtual_stages=2), "does not combine with parallel.virtual_stages=2"),
    "virtual alone": (1, {}, given(virtual_stages=2), "virtual_stages=2 has no effect with parallel.pipeline=1"),
    "virtual layers": (
        2,
        {},
        given(pipeline=2, virtual_stages=2),
        "not divisible by parallel.pipeline x virtual_stages = 4: choose virtual_stages that divides 3",
    ),
    "context": (2, {}, given(context=2), "parallel.context=2 needs an attention kernel .* set parallel.context=1"),
    "ZeRO-3": (1, {}, given(zero=3), "parallel.zero=3 is not supported: .* Use parallel.zero=1 or 2"),
    "offload without shards": (1, {}, given(zero=0, offload={"optimizer": True}), "offload.optimizer=true moves the state .* and parallel.zero=0: set parallel.zero=1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_the_key_and_a_way_out(case: str) -> None:
    world, model, parallel, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        layout(world, model, **parallel)
    assert "\n" not in str(caught.value)


def test_choices_offered_by_refusals_work() -> None:
    layout(4, {}, tensor=2)
    layout(4, {}, pipeline=4, pipeline_split=[2, 2, 1, 1])
    layout(6, {}, pipeline=6)
    layout(2, given(vocab_multiple=2, vocab_size=121), tensor=2)
    layout(2, {}, pipeline=2, virtual_stages=3)


def test_batches_that_the_schedule_cannot_cut() -> None:
    sequence = layout(2, {}, tensor=2, sequence_parallel=True)
    with pytest.raises(UserError, match=r"data.seq_length=15 is not divisible by parallel.tensor=2.*: use 16"):
        sequence.check_batches(15, 1)
    sequence.check_batches(16, 1)
    interleaved = layout(2, {}, pipeline=2, virtual_stages=3)
    with pytest.raises(UserError, match=r"3 micro-batches per step and rank are not a multiple of parallel.pipeline=2.*virtual_stages=1"):
        interleaved.check_batches(16, 3)
    interleaved.check_batches(16, 4)
    layout(2, {}, pipeline=2).check_batches(15, 3)


def test_degrees() -> None:
    one = layout(8, {}, tensor=2, pipeline=2, zero=2)
    assert one.data == 2
    assert one.summary() == {"tp": 2, "pp": 2, "vp": 1, "cp": 1, "dp": 2, "zero": 2}


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
    config = run_config(parallel=given(pipeline=2, virtual_stages=2))
    topology = rebuild(config.parallel, config.model)
    return tensor_first | {
        "data": (topology.get_data_parallel_group_ranks(), topology.get_data_parallel_world_size(), topology.data_rank),
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
    plain, interleaved = ranks[0]["core"], ranks[0]["interleaved"]
    assert (plain["overlap_p2p_comm"], plain["batch_p2p_comm"], plain["virtual_pipeline_model_parallel_size"]) == (False, True, None)
    # Batched messages between two interleaved stages are swapped and give wrong gradients.
    assert (interleaved["overlap_p2p_comm"], interleaved["batch_p2p_comm"], interleaved["virtual_pipeline_model_parallel_size"]) == (True, False, 2)


def test_topology_refuses_other_attributes() -> None:
    with pytest.raises(AttributeError):
        _ = Topology.__new__(Topology).anything
