"""`fathom plan`'s predictions.

Memory by hand, layouts that are possible, and the table of published runs as documented.
"""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.cost.activations import Activations
from model.errors import UserError
from model.parameters.size import parameter_count
from model.parameters.table import parameter_table
from parallel.config import ParallelConfig, RecomputeConfig
from parallel.hardware.gpus import PLANNED, planned_gpu
from parallel.topology import check_layout
from pretrain.plan.layouts import RESERVED, Work, possible, predict, rank, why_none
from pretrain.plan.memory import peak_memory, stages
from pretrain.plan.published import errors, table
from pretrain.plan.speed import LAUNCH_S, LIMITS, TRAFFIC, WIRE, FusedProducts, bubble_share
from tools.runs.plan import plan

MODEL = ModelConfig(
    scheme="pre_ln",
    num_layers=8,
    hidden_size=256,
    num_attention_heads=8,
    vocab_size=1024,
    max_position_embeddings=128,
)
WIDE = {"hidden_size": 8192, "num_attention_heads": 64}
H100 = planned_gpu("h100")
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "performance.md"


def test_documented_table_is_what_the_code_gives() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    documented = text.partition("<!-- published: begin -->\n")[2].partition("\n<!-- published: end -->")[0]
    assert documented == table(), "write it anew with python -m tests.documents.published"
    found = [abs(error) for error in errors()]
    assert statistics.median(found) < 0.08
    assert max(found) < 0.35


def test_losses_of_a_library_need_whole_tables_and_few_logits() -> None:
    work = Work(MODEL.model_copy(update={"vocab_size": 131072}), 128, 16, "bf16")
    fused = replace(work, loss_kernel="liger")
    asked = ParallelConfig()
    assert {one.layout.tensor for one in possible(work, H100, 4, asked)} == {1, 2, 4}
    assert {one.layout.tensor for one in possible(fused, H100, 4, asked)} == {1}
    ours, theirs = (predict(one, H100, asked, 1, 8) for one in (work, fused))
    # 256 rows of logits for 1024 tokens, twice in bf16; the table's gradient in fp32, and rounded.
    assert theirs.memory.buffers == 131072 * (2 * 2 * 256 + (4 + 2) * 256)
    # Log-probabilities in fp32 are kept for no token.
    assert ours.memory.activations - theirs.memory.activations == 4 * 1024 * 131072


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 4])
def test_stages_hold_the_whole_model(tensor: int, pipeline: int) -> None:
    untied = MODEL.model_copy(update={"tie_embeddings": False})
    layout = check_layout(ParallelConfig(tensor=tensor, pipeline=pipeline), untied, tensor * pipeline)
    held = sum(stage.parameters for stage in stages(untied, layout, 8))
    total = parameter_count(untied)["total"]
    if tensor == 1:
        assert held == total
    else:
        small = (
            128 * 256 + 8 * (4 * 256 + 2 * 256) + 2 * 256
        )  # position table, norms and row biases, which every rank has
        assert tensor * held == total + small


def test_memory_of_mixed_precision_by_hand() -> None:
    layout = check_layout(ParallelConfig(), MODEL, 4)
    parameters = parameter_count(MODEL)["total"]
    memory = peak_memory(MODEL, layout, Activations(MODEL, 1, 128, element=2), 4)
    assert memory.weights == 2 * parameters
    assert memory.optimizer == 12 * parameters / 4
    assert memory.gradients == 4 * parameters + 2 * 1024 * 256
    full = peak_memory(MODEL, layout, Activations(MODEL, 1, 128, element=2, recompute="full"), 4)
    assert full.activations < memory.activations == full.without_recompute


def test_bubble_and_interleaving() -> None:
    one, two = (check_layout(ParallelConfig(pipeline=4, virtual_stages=v), MODEL, 4) for v in (1, 2))
    assert bubble_share(one, 8) == 3 / 11
    assert bubble_share(two, 8) == 3 / 19
    flights = [stages(MODEL, layout, 8)[0].in_flight for layout in (one, two)]
    assert flights == [4, (2 * 3 + 4 + 1) / 2]


def test_more_gpus_are_faster_and_deeper_is_slower() -> None:
    work = Work(MODEL, 128, 64, "bf16")
    one, eight = (predict(work, H100, ParallelConfig(), world, 1).tokens_per_s for world in (1, 8))
    assert 4 < eight / one <= 8
    deep = MODEL.model_copy(update={"num_layers": 1000, "hidden_size": 64})
    launches = predict(Work(deep, 128, 64, "bf16"), H100, ParallelConfig(), 8, 1).time
    assert launches.host > launches.total / 2
    graphed = predict(Work(deep, 128, 64, "bf16", graph=True), H100, ParallelConfig(), 8, 1).time
    assert graphed.host == 0
    assert graphed.compute == pytest.approx(launches.compute - launches.host)


def test_a_graph_is_counted_where_a_run_may_have_one() -> None:
    drops = MODEL.model_copy(update={"hidden_dropout": 0.1})
    full = ParallelConfig(recompute=RecomputeConfig(granularity="full"))
    cases = (
        (MODEL, ParallelConfig(tensor=2, sequence_parallel=True), True),
        (MODEL, full, True),
        (drops, ParallelConfig(), True),
        (drops, full, False),
        (MODEL, ParallelConfig(pipeline=2), True),
        (MODEL, ParallelConfig(zero=3), False),
    )
    for model, parallel, graphed in cases:
        time = predict(Work(model, 128, 64, "bf16", graph=True), H100, parallel, 8, 1).time
        assert (time.host == 0) == graphed, parallel


def test_joined_kernels_move_less_and_keep_less() -> None:
    """Of layers with rotary positions and gates, which take most passes apart."""
    model = MODEL.model_copy(update={"position": "rotary", "activation": "swiglu"})
    apart, joined = (
        predict(Work(model, 128, 64, "bf16", graph=True, joined=joined), H100, ParallelConfig(), 1, 4)
        for joined in (False, True)
    )
    moved = [one.time.total * one.time.shares()["bytes"] for one in (apart, joined)]
    assert moved[1] < 0.75 * moved[0]
    assert joined.memory.activations < 0.95 * apart.memory.activations
    assert joined.time.products == apart.time.products


def test_products_that_add_are_counted_where_a_run_may_have_them() -> None:
    """Four additions fewer a layer and micro-batch for sums, and two for residuals."""
    plain = MODEL.model_copy(update={"bias": False})
    layers = plain.num_layers
    for fused, parallel, fewer in (
        (FusedProducts(sums=True), ParallelConfig(), 4),
        (FusedProducts(sums=True), ParallelConfig(zero=3), 0),
        (FusedProducts(residual=True), ParallelConfig(), 2),
        (FusedProducts(residual=True), ParallelConfig(tensor=2), 0),
        (FusedProducts(residual=True), ParallelConfig(zero=3), 0),
    ):
        works = Work(plain, 128, 64, "bf16"), Work(plain, 128, 64, "bf16", fused=fused)
        apart, added = (predict(work, H100, parallel, 8, 1) for work in works)
        saved = apart.time.compute - added.time.compute
        # A model this small waits for the host. Sums move fewer bytes too.
        assert saved >= 0.999 * apart.micro_batches * layers * fewer * LAUNCH_S, fused
        assert (saved == 0) == (fewer == 0), fused


def test_gradients_in_bf16_are_half_the_bytes_of_the_reduction() -> None:
    """Of the rest, the new weights: 2 of 6 bytes a parameter."""
    work = Work(MODEL, 128, 64, "bf16")
    wide, narrow = (
        predict(work, H100, ParallelConfig(grad_reduce=form, overlap_grad_reduce=early), 8, 1).time
        for form, early in (("fp32", False), ("bf16", None))
    )
    assert narrow.communication == pytest.approx(wide.communication * 4 / 6)


def test_fp8_keeps_casts_of_the_layers_weights() -> None:
    plain, cast = (
        predict(Work(MODEL, 128, 64, precision), H100, ParallelConfig(), 8, 1).memory
        for precision in ("bf16", "fp8")
    )
    in_layers = sum(row.elements for row in parameter_table(MODEL) if row.layer is not None)
    assert cast.weights - plain.weights == 2 * in_layers
    assert cast.activations == plain.activations


def test_muon_keeps_one_moment_of_matrices_and_multiplies_them() -> None:
    hidden = sum(row.elements for row in parameter_table(MODEL) if row.hidden)
    adam, muon = (
        predict(Work(MODEL, 128, 64, "bf16", optimizer=kind), H100, ParallelConfig(), 8, 1)
        for kind in ("adamw", "muon")
    )
    assert adam.memory.optimizer - muon.memory.optimizer == 4 * hidden / 8
    # Query, key, value and output projection are 256 x 256, the feed-forward's 256 x 1024 each.
    products = 8 * 5 * (4 * 6 * 256**3 + 2 * (4 * 256**2 * 1024 + 2 * 256**3))
    in_products = products / 8 / (H100.peak("bf16") * H100.matmul)
    in_wires = hidden * 2 * 7 / 8 / (WIRE * H100.link)
    in_memory = 4 * hidden / 8 * (17 - 7) / (H100.bandwidth * TRAFFIC)
    assert muon.time.optimizer - adam.time.optimizer == pytest.approx(in_products + in_wires + in_memory)


def test_ranked_layouts_are_possible_and_fit() -> None:
    big = ModelConfig(
        scheme="pre_ln",
        num_layers=90,
        hidden_size=8192,
        num_attention_heads=64,
        vocab_size=50257,
        max_position_embeddings=2048,
    )
    found = rank(possible(Work(big, 2048, 512, "bf16"), H100, 64, ParallelConfig()), most=100)
    assert len(found) > 10
    assert all(one.memory.total + RESERVED <= H100.memory for one in found)
    assert [one.time.total for one in found] == pytest.approx(
        sorted(one.time.total for one in found), rel=1e-2
    )
    assert all(
        one.layout.tensor * one.layout.pipeline > 1 for one in found
    )  # 1.4 TB of state do not fit in one GPU
    assert all(math.isfinite(one.mfu) and 0 < one.mfu < 0.76 for one in found)
    alone = possible(Work(big, 2048, 512, "bf16"), H100, 1, ParallelConfig())
    assert rank(alone) == []
    assert why_none(Work(big, 2048, 512, "bf16"), H100, 1, alone).startswith(
        "No layout fits: the smallest needs "
    )


def test_ranked_layouts_reduce_gradients_as_configured() -> None:
    """Those whose ranks all hold other weights have nothing to reduce."""
    found = possible(Work(MODEL, 128, 64, "bf16"), H100, 8, ParallelConfig(grad_reduce="bf16"))
    formats = {(one.parallel.grad_reduce, one.layout.replicas > 1) for one in found}
    assert formats == {("bf16", True), ("fp32", False)}


def test_why_no_layout_is_possible() -> None:
    work = Work(MODEL, 128, 64, "bf16")
    for world, words in (
        (
            1_000_000,
            "1000000 GPUs are more than train.global_batch_size=64 samples can keep busy, .* (4096 GPUs)",
        ),
        (7 * 11, "no tensor x pipeline degrees for this model divide 77 GPUs"),
    ):
        tried = possible(work, H100, world, ParallelConfig())
        assert rank(tried) == []
        assert re.search(words.replace("(", r"\(").replace(")", r"\)"), why_none(work, H100, world, tried))


@pytest.mark.parametrize(
    ("sizes", "batch", "parallel", "world", "limit"),
    [
        ({**WIDE, "max_position_embeddings": 8192}, 1, {}, 1, "products"),
        ({"vocab_size": 262144, "num_layers": 1}, 8, {}, 1, "bytes"),
        ({"num_layers": 1000}, 64, {}, 8, "launches"),
        (WIDE, 512, {}, 512, "reduction"),
        ({**WIDE, "num_query_groups": 64}, 64, {"tensor": 64, "sequence_parallel": True}, 64, "reduction"),
        ({"max_position_embeddings": 65536, "hidden_size": 2048}, 1, {}, 1, "attention"),
        ({}, 2, {"pipeline": 8}, 8, "bubble"),
    ],
)
def test_what_limits_a_step(
    sizes: dict[str, int], batch: int, parallel: dict[str, Any], world: int, limit: str
) -> None:
    config = ModelConfig.model_validate(MODEL.model_dump() | sizes)
    work = Work(config, config.max_position_embeddings or 0, batch, "bf16")
    time = predict(work, H100, ParallelConfig.model_validate(parallel), world, 1).time
    shares = time.shares()
    assert next(iter(shares)) == limit
    assert sum(shares.values()) == pytest.approx(1)
    assert shares.keys() == LIMITS.keys()
    assert all(share >= 0 for share in shares.values())


def test_recompute_costs_time_and_saves_memory() -> None:
    work = Work(MODEL.model_copy(update={"hidden_size": 2048}), 128, 64, "bf16")
    plain, full = (
        predict(work, H100, ParallelConfig(recompute=RecomputeConfig(granularity=kind)), 8, 8)
        for kind in ("none", "full")
    )
    assert full.time.total > plain.time.total
    assert full.memory.total < plain.memory.total


def test_cut_sequences_save_activations_and_send_keys() -> None:
    """As many GPUs over the same samples: four replicas, or four pieces of every sample."""
    long = MODEL.model_copy(update={"num_query_groups": 2})
    work = Work(long, 4096, 4, "bf16")
    whole, cut, again = (
        predict(work, H100, parallel, 4, 1)
        for parallel in (
            ParallelConfig(),
            ParallelConfig(context=4),
            ParallelConfig(context=4, recompute=RecomputeConfig(granularity="selective")),
        )
    )
    assert (whole.micro_batches, cut.micro_batches) == (1, 4)
    # Two groups of 32 in bf16, keys and values: 8 layers, 4 micro-batches, there and back.
    assert cut.traffic.context == 2 * 8 * 4 * (2 * 4096 * 64 * 2) * 3 / 4
    assert (whole.traffic.context, again.traffic.context) == (0, cut.traffic.context * 3 / 2)
    assert cut.traffic.data == whole.traffic.data
    assert (cut.memory.optimizer, cut.memory.weights) == (whole.memory.optimizer, whole.memory.weights)
    assert 0.25 < cut.memory.activations / whole.memory.activations < 0.35
    assert cut.time.products == pytest.approx(whole.time.products)
    assert cut.time.attention == pytest.approx(whole.time.attention)
    assert cut.time.tensor > whole.time.tensor == 0


def test_an_fp32_stream_costs_traffic_and_checkpoints() -> None:
    parallel = ParallelConfig(pipeline=4, recompute=RecomputeConfig(granularity="full"))
    narrow, wide = (
        predict(Work(MODEL, 128, 64, "bf16", fp32_stream=wide), H100, parallel, 8, 1)
        for wide in (False, True)
    )
    assert wide.traffic.pipeline == 2 * narrow.traffic.pipeline
    assert wide.traffic.tensor == narrow.traffic.tensor
    assert wide.memory.activations > narrow.memory.activations
    assert wide.memory.weights == narrow.memory.weights
    assert narrow.time.total < wide.time.total < 1.5 * narrow.time.total


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=f"--gpu v100 is not known: choose one of {', '.join(PLANNED)}"):
        planned_gpu("v100")
    with pytest.raises(UserError, match="has no fp8"):
        predict(Work(MODEL, 128, 8, "fp8"), planned_gpu("a100"), ParallelConfig(), 1, 1)
    with pytest.raises(UserError, match="train.global_batch_size=6 is not divisible"):
        predict(Work(MODEL, 128, 6, "bf16"), H100, ParallelConfig(), 4, 1)
    with pytest.raises(UserError, match="model.vocab_size is not known"):
        plan("configs/quickstart.yaml", ["data.corpora.0.path=nowhere"], 8, "h100", None, None, 3)


def test_whole_report_on_a_shipped_configuration() -> None:
    report = plan("configs/gpt2_xl.yaml", [], 8, "H100", 1e9, 2.0, 3)
    assert report["parameters"]["total"] > 1.5e9
    assert len(report["layouts"]) == 3
    own = report["configured"]
    assert "impossible" not in own
    assert own["cost"] == pytest.approx(own["days"] * 24 * 8 * 2)
    assert (own["limit"], report["why_none"]) == ("products", None)
    assert own["days"] == pytest.approx(1e9 / own["tokens_per_s"] / 86400)
    assert own["memory"]["total"] == pytest.approx(
        sum(own["memory"][part] for part in ("weights", "gradients", "optimizer", "activations", "buffers"))
    )
    assert (
        "impossible"
        in plan("configs/gpt2_xl.yaml", ["parallel.tensor=3"], 6, "h100", None, None, 1)["configured"]
    )
