"""`fathom plan`'s predictions for encoder-decoders: what ranks hold, send and compute."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from model.config import ModelConfig
from model.cost.activations import Activations
from model.cost.flops import forward_flops
from model.parameters.size import parameter_count
from model.parameters.table import parameter_table
from parallel.config import ParallelConfig
from parallel.hardware.gpus import planned_gpu
from parallel.topology import balanced_split, check_layout
from pretrain.plan.layouts import RESERVED, Work, possible, predict, rank
from pretrain.plan.memory import stages
from pretrain.plan.speed import traffic
from tools.runs.plan import plan

SOURCE, TARGET, WIDTH = 96, 128, 256
MODEL = ModelConfig(
    family="seq2seq",
    scheme="pre_ln",
    encoder_layers=6,
    num_layers=10,
    hidden_size=WIDTH,
    num_attention_heads=8,
    vocab_size=1024,
    max_position_embeddings=TARGET,
    max_source_positions=SOURCE,
)
WORDS = 1024 * WIDTH
H100 = planned_gpu("h100")


def given(**settings: Any) -> ParallelConfig:
    return ParallelConfig.model_validate(settings)


def work_of(config: ModelConfig = MODEL, batch: int = 64) -> Work:
    return Work(config, TARGET, batch, "bf16", source_length=SOURCE)


@pytest.mark.parametrize(
    "cut",
    [{}, {"pipeline": 4}, {"pipeline": 4, "pipeline_split": "auto"}, {"pipeline": 2, "virtual_stages": 4}],
)
@pytest.mark.parametrize("shared", [True, False])
def test_stages_hold_the_whole_model(cut: dict[str, Any], shared: bool) -> None:
    """The last stage also holds the decoder's table of words, never the encoder's own."""
    config = MODEL.model_copy(update={"share_embeddings": shared})
    layout = check_layout(given(**cut), config, cut.get("pipeline", 1))
    held = sum(stage.parameters for stage in stages(config, layout, 8))
    assert held == parameter_count(config)["total"] + (WORDS if cut else 0)


def test_a_rank_holds_its_chunks_of_either_stack() -> None:
    layout = check_layout(given(pipeline=2, virtual_stages=4), MODEL, 2)
    first, second = stages(MODEL, layout, 8)
    found = [
        [[(part.stack.name, part.count) for part in chunk] for chunk in one.chunks] for one in (first, second)
    ]
    encoder, decoder = [("encoder", 2)], [("decoder", 2)]
    assert found == [[encoder, encoder, decoder, decoder], [encoder, decoder, decoder, decoder]]
    sizes = [0] * MODEL.total_layers
    for row in parameter_table(MODEL):
        if row.layer is not None:
            sizes[row.layer] += row.elements
    assert first.in_layers == sum(sizes[start] + sizes[start + 1] for start in (0, 4, 8, 12))


def test_stages_send_both_streams() -> None:
    layout = check_layout(given(pipeline=2, tensor=2, sequence_parallel=True), MODEL, 4)
    a = Activations(
        MODEL, 2, TARGET, element=2, tensor=2, sequence_parallel=True, source_length=SOURCE, recompute="full"
    )
    # Eight layers each: six of the encoder and two of the decoder, and eight of the decoder.
    first, second = (traffic(layout, stage, a, 4) for stage in stages(MODEL, layout, 4))
    assert first.pipeline == second.pipeline == 4 * 2 * 2 * (SOURCE + TARGET) // 2 * WIDTH * 2
    source, target = (2 * length * WIDTH * 2 for length in (SOURCE, TARGET))  # whole streams in bytes
    # A sublayer gathers and scatters in three passes; what cross-attention reads is gathered in the
    # two that are forward, and its gradient is scattered.
    own, read = 3 * 2 / 2, 3 / 2
    decoder = 3 * own * target + read * source
    assert first.tensor == 4 * (6 * 2 * own * source + 2 * decoder)
    assert second.tensor == 4 * 8 * decoder


def test_the_time_of_products_is_that_of_the_operations() -> None:
    """In one process, whatever stack they are of."""
    sizes = {"encoder_attention_heads": 4, "encoder_ffn_hidden_size": 768, "head_dim": 32}
    config = ModelConfig.model_validate(MODEL.model_dump() | sizes)
    flops = forward_flops(config, TARGET, source_length=SOURCE)
    products = 3 * (flops.attention_linear + flops.mlp + flops.vocabulary)
    found = predict(work_of(config), H100, ParallelConfig(), 1, 8)
    expected = products * 64 * TARGET / (H100.peak("bf16") * H100.matmul)
    assert found.time.products == pytest.approx(expected, rel=1e-12)
    assert found.mfu == pytest.approx(3 * flops.total * 64 * TARGET / found.time.total / H100.peak("bf16"))


def test_a_longer_source_costs_memory_time_and_messages() -> None:
    parallel = given(pipeline=2)
    short, long = (
        predict(Work(MODEL, TARGET, 64, "bf16", source_length=length), H100, parallel, 2, 8)
        for length in (SOURCE, 4 * SOURCE)
    )
    assert long.memory.activations > short.memory.activations
    assert long.traffic.pipeline / short.traffic.pipeline == (4 * SOURCE + TARGET) / (SOURCE + TARGET)
    assert long.time.total > short.time.total
    assert long.tokens_per_s < short.tokens_per_s


def test_ranked_pipelines_are_balanced() -> None:
    """By sublayers: of 6 + 10 layers, 42 sublayers, no stage of four has more than 12."""
    found = rank(possible(work_of(), H100, 8, ParallelConfig()), most=1000)
    assert all(one.memory.total + RESERVED <= H100.memory for one in found)
    cut = {(one.layout.pipeline, one.layout.pipeline_split) for one in found if one.layout.virtual == 1}
    assert cut == {(1, None), *((count, balanced_split(MODEL, count)) for count in (2, 4, 8))}
    ends = [0, *itertools.accumulate(balanced_split(MODEL, 4))]
    costs = [place.sublayers for place in MODEL.placed_layers()]
    assert max(sum(costs[start:end]) for start, end in itertools.pairwise(ends)) == 12
    assert {one.layout.virtual for one in found} == {1, 2, 4, 8}


def test_report_on_a_shipped_configuration() -> None:
    report = plan("configs/wmt_en_de_6_layers.yaml", ["model.vocab_size=32000"], 2, "h100", None, None, 3)
    assert "impossible" not in report["configured"]
    assert report["configured"]["fits"]
    assert len(report["layouts"]) == 3
