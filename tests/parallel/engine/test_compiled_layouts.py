"""Compiled layers under layouts whose collectives and second passes lie inside the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import model.layers.compiled
from model.layers.compiled import GROUP, GROUPED_FROM, compile_layers
from model.layers.regions import product_of_columns, product_of_rows
from parallel.engine.engine import Engine
from pretrain.config.schema import RunConfig
from tests.distributed import Group, gather, launch
from tests.parallel.checkpoint.test_resume import all_resumed
from tests.parallel.layouts import FULL, LLAMA, PP, SELECTIVE, SP, TP, Case, check, compare
from tests.parallel.training import DROPOUT, SEQ2SEQ, Curve, engine_of, given, run, run_config, whole_curve

STEPS = 4
QUICK = [
    Case("TP2, subln, selective recompute", 2, TP | SELECTIVE, given(scheme="subln")),
    Case(
        "TP2 + SP, layernorm_scaling, full recompute", 2, SP | FULL, LLAMA | given(scheme="layernorm_scaling")
    ),
]
SLOW = [
    Case("TP2", 2, TP, given(num_layers=6)),
    Case("TP2 + SP, mix_ln", 2, SP, given(scheme="mix_ln")),
    Case("TP2, encoder-decoder", 2, TP, SEQ2SEQ),
    Case("PP2, full recompute", 2, PP | FULL),
]
GROUPED = [
    Case("TP2 + SP, two layers a call and one", 2, SP, given(num_layers=3)),
    Case("PP2, two layers a call and one", 2, PP, given(num_layers=6)),
]
DEEP = [
    Case("TP2 + SP, 192 layers", 2, SP, given(num_layers=GROUPED_FROM)),
    Case("PP2, 2 x 192 layers", 2, PP, given(num_layers=2 * GROUPED_FROM)),
]
COUNTS = {
    "TP2 + SP, two layers a call and one": 2,
    "PP2, two layers a call and one": 2,
    "TP2 + SP, layernorm_scaling, full recompute": 2,
    "TP2 + SP, mix_ln": 2,
    "TP2, encoder-decoder": 3,
    "PP2, full recompute": 2,
}
"""Compilations, where they are not one.

Schemes and stacks have kinds of layers. A recomputed layer is compiled without gradients for the
forward pass too.
"""


def compiled(config: RunConfig, backend: str) -> tuple[Engine, list[int]]:
    """An engine with compiled layers, and what grows by one for each compilation."""
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    graphs: list[int] = []
    compiler = lookup_backend(backend)

    def counting(module: torch.fx.GraphModule, inputs: Any, **more: Any) -> Any:
        function = compiler(module, inputs, **more)
        graphs.append(1)  # a compiler may ask to have the function traced again first
        return function

    engine = engine_of(config)
    compile_layers(engine.chunks, backend=counting)  # type: ignore[arg-type]
    return engine, graphs


def ranks(
    cases: list[Case], backend: str, grouped_from: int, group: int
) -> dict[str, tuple[Curve, Curve, int]]:
    """Runs inside two ranks: each case eager and compiled, and compilations."""
    model.layers.compiled.GROUPED_FROM, model.layers.compiled.GROUP = grouped_from, group
    found = {}
    for case in cases:
        config = case.config()
        eager = run(config, STEPS)
        engine, graphs = compiled(config, backend)
        found[case.name] = (eager, whole_curve(config, engine, STEPS), len(graphs))
    return found


def exchanges() -> tuple[list[str], list[str]]:
    """Runs inside two ranks: products and what is exchanged around them, forward and backward.

    Of a norm and two products over a cut stream.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    group = torch.distributed.group.WORLD
    found: list[list[str]] = []

    def noting(module: torch.fx.GraphModule, inputs: Any) -> Any:
        names = [str(node.target).split(".")[-2] for node in module.graph.nodes if "." in str(node.target)]
        found.append([name for name in names if name == "mm" or "tensor" in name])
        return module.forward

    def passed(x_sbh: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        inner = product_of_rows(torch.nn.functional.layer_norm(x_sbh, (8,)), up, group, cut=True)
        return x_sbh + product_of_columns(inner.relu(), down, group, cut=True)

    backend = aot_autograd(
        fw_compiler=noting, bw_compiler=noting, partition_fn=min_cut_rematerialization_partition
    )
    parts = [torch.randn(shape, requires_grad=True) for shape in ((3, 2, 8), (16, 8), (8, 16))]
    torch.compile(passed, backend=backend, fullgraph=True)(*parts).sum().backward()
    forward, backward = found
    return forward, backward


def test_a_piece_is_kept_and_sent_while_a_product_runs() -> None:
    forward, backward = launch(Group(2, exchanges))[0][0]
    gather, scatter, wait = "all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor"
    assert forward == [gather, wait, "mm", "mm", scatter, wait]
    assert backward[:5] == [gather, wait, "mm", "mm", "mm"]  # of what comes back, and around the inner part
    assert backward[5:] == [scatter, gather, wait, "mm", wait]


def hold(cases: list[Case], backend: str, grouped_from: int = GROUPED_FROM, group: int = GROUP) -> None:
    found = launch(Group(2, ranks, (cases, backend, grouped_from, group)))[0][0]
    for case in cases:
        eager, curve, graphs = found[case.name]
        check(case, compare(case, curve, eager))
        assert graphs == COUNTS.get(case.name, 1), case.name


def test_compiled_steps_are_the_steps() -> None:
    """All but PyTorch's generator of code, which the slow tests have."""
    hold(QUICK, "aot_eager")


def test_steps_of_layers_that_are_called_together_are_the_steps() -> None:
    hold(GROUPED, "aot_eager", grouped_from=3, group=2)


@pytest.mark.slow
def test_steps_of_very_deep_stacks_are_the_steps() -> None:
    hold(DEEP, "aot_eager")


@pytest.mark.slow
def test_compiled_steps_of_more_layouts_are_the_steps() -> None:
    hold(SLOW, "aot_eager")


@pytest.mark.slow
def test_steps_by_inductor_are_the_steps() -> None:
    hold(QUICK, "inductor")


HIDDEN = given(hidden_dropout=0.1)
COMPILE = given(compile=True)
AGAIN = [FULL, SELECTIVE]


def dropping(parallel: dict[str, Any], model: dict[str, Any]) -> tuple[Curve, bytes]:
    """A compiled training, and the state of this rank's model-parallel stream after it."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch._dynamo.reset()
    config = run_config(model, parallel, COMPILE)
    curve = run(config, STEPS)
    return curve, get_cuda_rng_tracker().get_states()["model-parallel-rng"].numpy().tobytes()


def dropping_ranks() -> dict[str, Any]:
    """Runs inside two ranks."""
    first, stream = dropping(SP, DROPOUT)
    return {
        "first": first,
        "streams": gather(stream),
        "again": [dropping(SP | how, DROPOUT)[0] for how in ({}, *AGAIN)],
        "hidden": dropping(TP, HIDDEN)[0],
        "resumed": all_resumed({"TP2 + SP": run_config(DROPOUT, SP, COMPILE)}),
        "eager": run(run_config({}, SP), STEPS).losses,
        "compiled": dropping(SP, {})[0].losses,
    }


def dropping_alone() -> Curve:
    """Runs inside one rank."""
    return dropping({}, HIDDEN)[0]


@pytest.mark.slow
def test_compiled_dropout_draws_from_the_right_streams() -> None:
    """By PyTorch's own compiler: masks of a run are those of the same run.

    Also where layers are computed again, and where the run is resumed.
    """
    one, two = launch(Group(1, dropping_alone), Group(2, dropping_ranks))
    alone, found = one[0], two[0]
    first = found["first"]
    assert not first.unequal
    assert found["again"][0].losses == first.losses
    for again in found["again"]:
        assert again.losses == pytest.approx(first.losses, rel=1e-6)
        assert again.norms == pytest.approx(first.norms, rel=1e-6)
    assert len(set(found["streams"])) == 2  # shards of the sequence have masks of their own
    assert not found["hidden"].unequal
    assert found["hidden"].losses == pytest.approx(alone.losses, rel=1e-6)
    assert all(found["resumed"]["TP2 + SP"].values())
    assert found["compiled"] == pytest.approx(found["eager"], rel=1e-6)
    assert found["compiled"] != pytest.approx(first.losses, rel=1e-4)
