"""Steps by a CUDA graph are the steps without one, on an imitation of graphs that a CPU can run."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from model.depth.schemes import SCHEMES
from model.errors import UserError
from parallel.checkpoint.random_state import rng_states, set_rng_states
from parallel.engine import overlap
from parallel.engine.engine import Engine
from parallel.engine.gradients import GradientBuffer
from parallel.engine.step_graph import WARM_UP, Batch, StepGraph
from parallel.launch.one_process import single_process
from pretrain.data.samples import next_tokens
from pretrain.tasks.causal_lm import CAUSAL_LM
from pretrain.train.build import build_engine
from pretrain.train.steps import evaluation_step, training_step
from tests.distributed import Group, gather, launch, rebuild
from tests.parallel.graph_emulator import Graph, emulated
from tests.parallel.training import DROPOUT, SEQ2SEQ, batches_of, forward_step, run_config, sample

STEPS, MICRO, ACCUMULATION = WARM_UP + 4, 2, 2


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Graph]]:
    monkeypatch.setattr("pretrain.train.compiling.check_graphs", lambda seq_length: None)
    with emulated() as kind:
        yield kind


def engine_of(graph: bool, scheme: str = "pre_ln", precision: str = "fp32") -> Engine:
    return build_engine(
        run_config({"scheme": scheme}, train={"cuda_graph": graph, "precision": precision}), single_process()
    )


def batches(step: int, length: int = 16) -> list[Batch]:
    return [
        next_tokens(torch.stack([sample(100 * step + 10 * part + row)[: length + 1] for row in range(MICRO)]))
        for part in range(ACCUMULATION)
    ]


def one_step(engine: Engine, step: int, **more: Any) -> tuple[float, float]:
    engine.set_lr(1e-2 / step)
    micro = batches(step)
    result = engine.train_step(forward_step, lambda: iter(micro), len(micro), **more)
    return result.loss, result.grad_norm


def weights(engine: Engine) -> dict[str, Tensor]:
    return {named.name: named.parameter.detach().clone() for named in engine.parameters}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_steps_are_bit_identical(scheme: str, precision: str, graphs: type[Graph]) -> None:
    eager, graphed = engine_of(False, scheme, precision), engine_of(True, scheme, precision)
    for step in range(1, STEPS + 1):
        assert one_step(graphed, step) == one_step(eager, step)
    assert (graphs.captures, graphs.replays) == (1, STEPS - WARM_UP)
    expected = weights(eager)
    assert all(torch.equal(value, expected[name]) for name, value in weights(graphed).items())


@pytest.mark.parametrize(
    "model",
    [{"family": "bert", "token_types": 2}, SEQ2SEQ],
)
def test_steps_with_masks_and_weights_are_bit_identical(model: dict[str, Any], graphs: type[Graph]) -> None:
    """Masks, targets and what labels weigh are read anew by every replay."""
    engines = [
        build_engine(run_config(model, train={"cuda_graph": graph}), single_process())
        for graph in (False, True)
    ]
    config = run_config(model)
    for step in range(1, STEPS + 1):
        results = []
        for engine in engines:
            engine.set_lr(1e-2 / step)
            micro = batches_of(config, engine, step)
            results.append(
                engine.train_step(training_step(config.task), functools.partial(iter, micro), len(micro))
            )
        assert results[0] == results[1]
    assert graphs.replays == STEPS - WARM_UP


HIDDEN = {"hidden_dropout": 0.1}
FULL, SELECTIVE = {"granularity": "full"}, {"granularity": "selective"}
Steps = tuple[list[tuple[float, float]], dict[str, Tensor]]


def steps_of(
    graph: bool,
    model: dict[str, Any],
    recompute: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    steps: int = STEPS,
    **train: Any,
) -> Steps:
    """A training from its seed: losses and norms, and this rank's weights at its end."""
    config = run_config(model, (parallel or {}) | {"recompute": recompute}, {"cuda_graph": graph} | train)
    engine = build_engine(config, rebuild(config.parallel, config.model) if parallel else single_process())
    return [one_step(engine, step) for step in range(1, steps + 1)], weights(engine)


def same(ours: Steps, theirs: Steps) -> bool:
    return ours[0] == theirs[0] and all(value.equal(theirs[1][name]) for name, value in ours[1].items())


CASES = [(DROPOUT, {}), ({}, FULL), ({}, FULL | {"num_layers": 2}), (HIDDEN, SELECTIVE)]


@pytest.mark.parametrize(("model", "recompute"), CASES)
@pytest.mark.parametrize("steps", [STEPS, pytest.param(120, marks=pytest.mark.slow)])
def test_steps_that_drop_or_compute_again_are_bit_identical(
    model: dict[str, Any], recompute: dict[str, Any], steps: int, graphs: type[Graph]
) -> None:
    """Replays draw what eager steps would draw, from the default stream and from attention's."""
    eager, graphed = (steps_of(graph, model, recompute, steps=steps) for graph in (False, True))
    assert same(graphed, eager)
    assert graphs.replays == steps - WARM_UP
    if model:
        assert eager[0][-1] != steps_of(False, {}, {}, steps=steps)[0][-1]


def test_streams_of_a_graph_are_restored(graphs: type[Graph]) -> None:
    engine = build_engine(run_config(DROPOUT, train={"cuda_graph": True}), single_process())
    for step in range(1, WARM_UP + 2):
        one_step(engine, step)
    engine.set_lr(0.0)
    micro, saved = batches(0), rng_states()

    def loss() -> float:
        return engine.train_step(forward_step, lambda: iter(micro), len(micro)).loss

    first, second = loss(), loss()
    set_rng_states(saved)
    assert [loss(), loss()] == [first, second]
    assert first != second


def test_products_add_in_replays_too(graphs: type[Graph]) -> None:
    """To sums of gradients and to the residual."""
    train: dict[str, Any] = {
        "gradient_accumulation_fusion": True,
        "residual_in_product": True,
        "kernels": "local",
    }
    eager, graphed = (steps_of(graph, {"bias": False}, FULL, **train) for graph in (False, True))
    assert same(graphed, eager)
    assert graphs.replays == STEPS - WARM_UP


def ranks_with_graphs(steps: int) -> dict[str, list[bool]]:
    """Runs inside two ranks: whether steps by a graph are the steps without, on each rank."""
    layouts: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "TP2, dropout": ({"tensor": 2}, DROPOUT, {}),
        "TP2 + SP, dropout": ({"tensor": 2, "sequence_parallel": True}, DROPOUT, {}),
        "TP2 + SP, full recompute": ({"tensor": 2, "sequence_parallel": True}, {}, FULL),
        "PP2, dropout": ({"pipeline": 2}, DROPOUT, {}),
        "PP2 interleaved, full recompute": ({"pipeline": 2, "virtual_stages": 2}, {}, FULL),
    }
    found = {}
    with emulated() as kind, patch("pretrain.train.compiling.check_graphs"):
        for name, (parallel, model, recompute) in layouts.items():
            eager, graphed = (steps_of(graph, model, recompute, parallel, steps) for graph in (False, True))
            found[name] = gather(same(graphed, eager))
        found["replays"] = gather(kind.replays == len(layouts) * (steps - WARM_UP))
    return found


@pytest.mark.parametrize("steps", [STEPS, pytest.param(120, marks=pytest.mark.slow)])
def test_steps_of_several_ranks_are_bit_identical(steps: int) -> None:
    found = launch(Group(2, ranks_with_graphs, (steps,)))[0][0]
    assert len(found) == 6
    assert all(all(same) for same in found.values()), found


def ranks_that_reduce_in_graphs() -> tuple[bool, bool]:
    """Runs inside two ranks: whether weights are those without graphs, and pieces left early."""
    started: list[bool] = []
    reduce = GradientBuffer.reduce

    def noted(self: GradientBuffer) -> None:
        started.append(0 < self.started < self.flat.numel() and not self.works)
        reduce(self)

    with (
        emulated() as kind,
        patch("pretrain.train.compiling.check_graphs"),
        patch.object(overlap, "SMALLEST", 0),
        patch.object(GradientBuffer, "reduce", noted),
    ):
        model = {"num_layers": 12}
        eager = steps_of(False, model, {}, {"overlap_grad_reduce": False})
        assert not any(started)
        started.clear()
        graphed = steps_of(True, model, {}, {"overlap_grad_reduce": True})
        assert kind.replays == STEPS - WARM_UP
    return same(graphed, eager), all(sum(started[step::STEPS]) for step in range(STEPS))


def test_gradients_are_reduced_inside_a_graph() -> None:
    """The first pieces, to the same sums; Python does not run in a replay to say that they were."""
    assert launch(Group(2, ranks_that_reduce_in_graphs))[0] == [(True, True)] * 2


def test_a_watched_step_calls_hooks_and_the_next_one_captures_again(graphs: type[Graph]) -> None:
    eager, graphed = engine_of(False), engine_of(True)
    calls = []
    graphed.chunks[0].decoder.layers[0].register_forward_hook(lambda *args: calls.append(1))  # type: ignore[union-attr,index]
    seen = []
    for step in range(1, STEPS + 1):
        before = len(calls)
        assert one_step(graphed, step, watched=step == WARM_UP + 2) == one_step(eager, step)
        seen.append(len(calls) - before)
    captured, replayed = ACCUMULATION, 0
    assert seen == [*[ACCUMULATION] * WARM_UP, captured, ACCUMULATION, captured, replayed]
    assert (graphs.captures, graphs.replays) == (2, 3)


def test_an_evaluation_frees_the_graph_and_changes_nothing(graphs: type[Graph]) -> None:
    eager, graphed = engine_of(False), engine_of(True)
    for step in range(1, STEPS + 1):
        assert one_step(graphed, step) == one_step(eager, step)
        if step == WARM_UP + 2:
            held_out = functools.partial(iter, batches(1000))
            step_of = evaluation_step(CAUSAL_LM)
            assert graphed.evaluate(step_of, held_out, 2, 2) == eager.evaluate(step_of, held_out, 2, 2)
            assert graphed.graph is not None
            assert graphed.graph.graph is None
    assert graphs.captures == 2


class Passes:
    """A step whose loss and gradient are known: loss = weight . input, gradient = input.

    runs: how often Python ran.
    """

    def __init__(self) -> None:
        self.weight, self.gradient, self.runs = torch.tensor([2.0, 3.0]), torch.zeros(2), 0

    def __call__(self, micro: list[Batch]) -> list[Tensor]:
        self.runs += 1
        losses = []
        for batch in micro:
            x = batch["x"]
            self.gradient.add_(x)
            losses.append((self.weight * x).sum())
        return losses

    def step(self, graph: StepGraph, *values: float) -> tuple[list[float], list[float]]:
        self.gradient.zero_()
        losses = graph.run(self, [{"x": torch.tensor([value, 1.0])} for value in values])
        return [float(loss) for loss in losses], self.gradient.tolist()


def test_a_replay_reads_new_batches_and_the_present_weights(graphs: type[Graph]) -> None:
    passes, graph = Passes(), StepGraph()
    for number in range(WARM_UP + 3):
        assert passes.step(graph, number, 10.0) == ([2.0 * number + 3, 23.0], [number + 10.0, 2.0])
        if number >= WARM_UP:
            assert passes.runs == WARM_UP + 1
        assert (graph.capture_s is not None) == (number == WARM_UP)
    passes.weight.mul_(2)  # in place, as an optimizer does
    assert passes.step(graph, 1.0, 1.0)[0] == [10.0, 10.0]


def test_another_number_or_shape_of_batches_is_captured_anew(graphs: type[Graph]) -> None:
    passes, graph = Passes(), StepGraph()
    for _ in range(WARM_UP + 1):
        passes.step(graph, 1.0)
    assert passes.step(graph, 1.0, 2.0)[0] == [5.0, 7.0]
    assert graphs.captures == 2


def test_memory_that_has_moved_is_captured_anew(graphs: type[Graph]) -> None:
    passes = Passes()
    graph = StepGraph([passes.weight])
    for _ in range(WARM_UP + 1):
        passes.step(graph, 1.0)
    passes.weight = passes.weight * 10
    graph.fixed = [passes.weight]
    assert passes.step(graph, 1.0)[0] == [50.0]
    assert graphs.captures == 2


class Failing:
    """Passes that fail in the capture with these errors.

    The later ones while the earlier are handled.
    """

    def __init__(self, graph: StepGraph, *errors: Exception) -> None:
        self.graph, self.errors = graph, errors

    def __call__(self, micro: list[Batch]) -> list[Tensor]:
        if self.graph.inputs:
            self._raise(list(self.errors))
        return [batch["x"] for batch in micro]

    def _raise(self, errors: list[Exception]) -> None:
        try:
            if len(errors) > 1:
                self._raise(errors[:-1])
        finally:
            raise errors[-1]


def captured(*errors: Exception) -> StepGraph:
    graph = StepGraph()
    for _ in range(WARM_UP + 1):
        graph.run(Failing(graph, *errors), [{"x": torch.ones(())}])
    return graph


def test_passes_that_cannot_be_captured_are_refused_in_one_line(graphs: type[Graph]) -> None:
    """With what failed first, not with what the end of the capture makes of it."""
    with pytest.raises(
        UserError,
        match=r"train.cuda_graph=true: .*\(not permitted when capturing\): set train.cuda_graph=false",
    ):
        captured(
            RuntimeError("not permitted when capturing\nand more"),
            RuntimeError("failed due to a previous error"),
        )
    assert gc.isenabled()


def test_want_of_memory_stays_what_it_is(graphs: type[Graph]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="too little"):
        captured(torch.OutOfMemoryError("too little"), RuntimeError("failed due to a previous error"))


def test_watched_steps_warm_nothing_up(graphs: type[Graph]) -> None:
    """They run compiled layers as they were before, for one thing."""
    graph = StepGraph()
    for _ in range(WARM_UP):
        graph.run(lambda micro: [batch["x"] for batch in micro], [{"x": torch.ones(())}], watched=True)
    assert graph.warm == 0
