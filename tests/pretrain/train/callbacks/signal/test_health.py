"""Signal health: the measured values against plain autograd.

Also what is written when, and warnings that name the layer.
"""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pretrain.train.callbacks.signal.hooks as signal_hooks
from model.depth.schemes import SCHEMES
from model.parameters.names import named_parameters
from parallel.launch.one_process import single_process
from pretrain.config.schema import RunConfig
from pretrain.config.sections.log import LogConfig
from pretrain.rundir.metrics import read_metrics
from pretrain.tasks.task import Batch
from pretrain.train.build import build_chunks
from pretrain.train.callbacks.base import Callback, StepRecord
from pretrain.train.callbacks.metrics_log import LOGGERS, MetricsFile, TensorBoard
from pretrain.train.callbacks.signal.health import SignalHealth, norms_of, summary
from pretrain.train.callbacks.signal.history import ENOUGH, History, message
from pretrain.train.callbacks.signal.hooks import largest_logit
from pretrain.train.callbacks.spread import spread
from tests.model.narrow import without_units
from tests.parallel.graph_emulator import emulated
from tests.parallel.training import forward_step
from tests.pretrain.small import small_config, small_data, small_trainer

# ---- departures ----------------------------------------------------------------------------------


def filled(values: list[float]) -> History:
    history = History()
    assert [history.check(1, "grad_norm", value) for value in values] == [None] * len(values)
    return history


def test_a_jump_departs_and_names_layer_and_factor() -> None:
    history = filled([1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0])
    departed = history.check(1, "grad_norm", 5.0)
    assert departed is not None
    assert (departed.layer, departed.key, departed.count) == (1, "grad_norm", 8)
    assert departed.factor == pytest.approx(5.0)
    assert "layer 1: grad_norm 5 is 5 times the median" in str(departed)
    assert history.check(1, "residual_rms", 5.0) is None  # another value has a history of its own


def test_a_collapse_departs_too() -> None:
    assert filled([1.0] * 8).check(1, "grad_norm", 0.2) is not None


def test_no_history_no_departure() -> None:
    assert filled([1.0] * (ENOUGH - 1)).check(1, "grad_norm", 100.0) is None


def test_what_varies_by_itself_may_vary() -> None:
    generator = random.Random(0)
    history = filled([math.exp(generator.gauss(0, 0.5)) for _ in range(30)])
    assert history.check(1, "grad_norm", 5.0) is None  # 3.2 standard deviations
    assert history.check(1, "grad_norm", 500.0) is not None


def test_small_but_sharp_moves_are_no_departure() -> None:
    assert filled([1.0] * 20).check(1, "grad_norm", 2.9) is None


def test_slow_growth_is_no_departure() -> None:
    filled([1.1**step for step in range(60)])


def test_a_quick_climb_is_no_jump() -> None:
    filled([1.0] * 12 + [1.7, 2.9, 4.9, 8.0])


def test_a_departure_is_reported_once_and_becomes_the_history() -> None:
    history = filled([1.0] * ENOUGH)
    assert history.check(1, "grad_norm", 10.0) is not None
    later = [history.check(1, "grad_norm", 10.0) for _ in range(30)]
    assert [index for index, departed in enumerate(later) if departed is not None] == []


def test_not_finite_departs_without_history() -> None:
    departed = History().check(3, "residual_rms", math.nan)
    assert departed is not None
    assert str(departed) == "layer 3: residual_rms is not finite"
    assert History().check(3, "residual_rms", 0.0) is None


def test_several_layers_make_one_line() -> None:
    histories = History()
    for layer in (1, 2, 3):
        for _ in range(8):
            histories.check(layer, "grad_norm", 1.0)
    departures = [
        histories.check(layer, "grad_norm", value) for layer, value in ((1, 4.0), (2, 400.0), (3, 4.0))
    ]
    found = [departed for departed in departures if departed is not None]
    text = message(found, 12)
    assert text.startswith("layer 2: grad_norm 400")
    assert text.endswith("; also in 2 of the other 11 layers")
    assert message(found[:2], 2).endswith("; also in the other layer")


# ---- single measurements -------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 40, 1 << 24])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_largest_logit_is_that_of_plain_causal_attention(
    piece: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal_hooks, "PIECE", piece)
    generator = torch.Generator().manual_seed(groups)
    query, key = (
        torch.randn(9, 2, 4, 6, generator=generator),
        torch.randn(9, 2, groups, 6, generator=generator),
    )
    scores = [
        float(query[i, 0, head] @ key[j, 0, head // (4 // groups)]) / math.sqrt(6)
        for head in range(4)
        for i in range(9)
        for j in range(i + 1)
    ]
    assert float(largest_logit(query, key)) == pytest.approx(max(scores), rel=1e-6)


def test_a_vanishing_gradient_is_not_zero() -> None:
    sizes = [3.0, 1e-18, 1e-30, 0.0, math.nan]
    norms = norms_of([torch.full((400,), size) for size in sizes])
    assert norms.tolist() == pytest.approx([60.0, 2e-17, 2e-29, 0.0, math.nan], rel=1e-6, abs=0, nan_ok=True)


def test_spread_has_both_ends() -> None:
    assert spread(3, 8) == [1, 2, 3]
    chosen = spread(1000, 8)
    assert (chosen[0], chosen[-1], len(chosen)) == (1, 1000, 8)


def test_summary_names_the_layers_of_the_extremes() -> None:
    short = summary(
        [
            {"layer": 1, "grad_norm": 2.0},
            {"layer": 2, "grad_norm": 5.0, "residual_rms": 1.0},
            {"layer": 3, "grad_norm": 1.0},
        ]
    )
    assert (
        short["grad_norm_first"],
        short["grad_norm_last"],
        short["grad_norm_max"],
        short["grad_norm_max_layer"],
    ) == (2.0, 1.0, 5.0, 2)
    assert (short["grad_norm_min"], short["grad_norm_min_layer"], short["residual_rms_first"]) == (
        1.0,
        3,
        1.0,
    )


# ---- in a run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def train(config: RunConfig, *more: Callback) -> tuple[list[dict[str, Any]], Any]:
    """Runs with signal health; returns the lines of metrics.jsonl and the trainer."""
    trainer = small_trainer(config)
    metrics = MetricsFile(config.log.interval)
    trainer.callbacks += [metrics, *more, SignalHealth(config.log.signal_interval)]
    trainer.run()
    return [
        json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()
    ], trainer


class Weights(Callback):
    """The layers' matrices before and after the step."""

    def before_step(self, trainer: Any) -> None:
        self.before = self.take(trainer)

    def on_step(self, trainer: Any, record: StepRecord) -> None:
        self.after = self.take(trainer)

    @staticmethod
    def take(trainer: Any) -> dict[str, Tensor]:
        return {
            named.name: named.parameter.detach().clone()
            for named in trainer.engine.parameters
            if named.parameter.dim() == 2
        }


def expected_layers(config: RunConfig, batches: list[Batch]) -> list[dict[str, float]]:
    """The same values from one plain forward and backward pass a micro-batch."""
    (chunk,) = build_chunks(
        config.model,
        single_process(),
        seq_length=config.data.seq_length,
        dtype=torch.float32,
        seed=config.train.seed,
    )
    streams: list[list[Tensor]] = []
    for batch in batches:
        trace: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output, trace=trace: trace.append(output[0]))
            for layer in chunk.decoder.layers
        ]
        output, loss_of = forward_step(iter([batch]), chunk)
        (loss_of(output)[0] / len(batches)).backward()
        for handle in handles:
            handle.remove()
        streams.append(trace)
    rows = []
    for index in range(config.model.num_layers):
        gradients = [
            named.parameter.grad
            for named in named_parameters(chunk, 0, 1)
            if named.name.startswith(f"decoder.layers.{index}.")
        ]
        square = sum(
            float(gradient.double().square().sum()) for gradient in gradients if gradient is not None
        )
        layer = [trace[index].detach().double() for trace in streams]
        rows.append(
            {
                "grad_norm": math.sqrt(square),
                "residual_rms": math.sqrt(sum(float(x.square().mean()) for x in layer) / len(layer)),
                "forward_variance": sum(float(x.var()) for x in layer) / len(layer),
                "common_share": plain_share(layer),
            }
        )
    return rows


def plain_share(streams: list[Tensor]) -> float:
    """Of all tokens of some streams [s, b, h]: square of their mean over the mean of squares."""
    tokens = torch.cat([stream.flatten(0, 1) for stream in streams])
    return float(tokens.mean(0).square().sum() / tokens.square().sum(1).mean())


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("zero", [0, 1])
def test_a_measured_step_is_what_plain_autograd_gives(
    data: Path, tmp_path: Path, zero: int, recompute: str
) -> None:
    config = small_config(data, tmp_path, 1, scheme="b2t", activation="relu")
    config.parallel.zero, config.parallel.recompute.granularity = zero, recompute  # type: ignore[assignment]
    weights = Weights()
    lines, trainer = train(config, weights)
    (event,) = [line for line in lines if line["event"] == "signal"]
    for layer, expected in zip(
        event["layers"], expected_layers(config, trainer.batches.fetch(0)), strict=True
    ):
        assert {key: layer[key] for key in expected} == pytest.approx(expected, rel=1e-4)
        names = [name for name in weights.before if name.startswith(f"decoder.layers.{layer['layer'] - 1}.")]
        moved = math.sqrt(
            sum(float((weights.after[name] - weights.before[name]).square().sum()) for name in names)
        )
        size = math.sqrt(sum(float(weights.after[name].square().sum()) for name in names))
        assert layer["update_ratio"] == pytest.approx(moved / size, rel=1e-4)
        assert layer["weight_norm"] == pytest.approx(size, rel=1e-4)
        assert {
            "branch_ratio_attention",
            "branch_ratio_mlp",
            "attention_logit_max",
            "grad_variance_late",
        } <= set(layer)


@pytest.mark.parametrize("scheme", ["deepscalelm_pre_ln", "deepnorm"])
def test_units_in_which_layers_compute_do_not_show(
    data: Path, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = train(small_config(data, tmp_path / "ours", 1, scheme=scheme))
    without_units(monkeypatch)
    plain, _ = train(small_config(data, tmp_path / "plain", 1, scheme=scheme))
    assert [line["event"] for line in ours] == [line["event"] for line in plain]
    for one, other in zip(ours, plain, strict=True):
        for layer, expected in zip(one.get("layers", ()), other.get("layers", ()), strict=True):
            assert layer == pytest.approx(expected, rel=1e-3)
        # Which layer is the extreme one means nothing where a norm makes all of them equal.
        short, long = (
            {key: value for key, value in line.get("signal", {}).items() if not key.endswith("_layer")}
            for line in (one, other)
        )
        assert short == pytest.approx(long, rel=1e-3)


class Forced(Callback):
    """Every branch is constant: `ratios` (attention, feed-forward) times what it is added to."""

    ratios = (0.3, 0.2)

    def on_start(self, trainer: Any) -> None:
        for layer in trainer.engine.chunks[0].decoder.layers:
            for join, ratio in zip((layer.self_attention_join, layer.mlp_join), self.ratios, strict=True):
                join.register_forward_pre_hook(functools.partial(self.force, ratio))

    @staticmethod
    def force(ratio: float, join: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        residual, _, _, layer_input = args
        base = join.residual_scale * residual + join.skip_scale * layer_input
        return residual, ratio * base.detach() / join.branch_scale, None, layer_input


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_run_forgets_is_what_its_stream_passes_of_the_gradient(
    data: Path, tmp_path: Path, scheme: str
) -> None:
    """Layer 1 apart: the size of the embedding is no part of forgetting."""
    config = small_config(data, tmp_path, 1, scheme=scheme, num_layers=5, norm_epsilon=1e-12)
    lines, _ = train(config, Forced())
    (event,) = [line for line in lines if line["event"] == "signal"]
    layers = event["layers"]
    for layer in layers:
        assert (layer["branch_ratio_attention"], layer["branch_ratio_mlp"]) == pytest.approx(
            Forced.ratios, rel=1e-5
        )
    passed = [
        math.log(layer["grad_variance_late"] / layers[-1]["grad_variance_late"]) / 2 for layer in layers
    ]
    implied = [layer["forgetting"] - layers[-1]["forgetting"] for layer in layers]
    assert implied[1:] == pytest.approx(passed[1:], abs=1e-4)


def test_the_update_of_a_large_matrix_is_estimated_from_a_sample(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, 1, hidden_size=64)
    weights = Weights()
    lines, _ = train(config, weights)
    (event,) = [line for line in lines if line["event"] == "signal"]
    for layer in event["layers"]:
        names = [name for name in weights.before if name.startswith(f"decoder.layers.{layer['layer'] - 1}.")]
        moved = math.sqrt(
            sum(float((weights.after[name] - weights.before[name]).square().sum()) for name in names)
        )
        size = math.sqrt(sum(float(weights.after[name].square().sum()) for name in names))
        assert layer["update_ratio"] == pytest.approx(moved / size, rel=0.05)


def test_every_logger_has_its_switch_and_gets_steps_evaluations_and_the_signal() -> None:
    for name, logger in LOGGERS.items():
        assert LogConfig.model_fields[name].annotation is bool
        for moment in ("on_step", "on_eval", "on_signal", "on_end"):
            assert getattr(logger, moment) is not getattr(Callback, moment), (name, moment)


def test_cheap_set_every_step_and_full_set_at_the_interval(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, 7, signal_interval=4)
    board = TensorBoard()
    lines, trainer = train(config, board)
    assert [line["step"] for line in lines if line["event"] == "signal"] == [1, 4, 7]
    steps = [line for line in lines if line["event"] == "train"]
    assert [step["step"] for step in steps] == list(range(1, 8))
    for step in steps:
        assert step["signal"]["grad_norm_max"] > 0
        assert step["signal"]["residual_rms_last"] > 0
        assert ("attention_logit_max_max" in step["signal"]) == (step["step"] in (1, 4, 7))
        squares = step["signal"]["grad_norm_max"] ** 2
        assert squares <= step["grad_norm"] ** 2 * 1.001
    assert len(read_metrics(trainer.run_dir / "metrics.jsonl").signal) == 3

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trainer.run_dir / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "signal/grad_norm_max",
        "signal_update_ratio/layer_0001",
        "signal_attention_logit_max/layer_0003",
    } <= tags
    assert [event.step for event in events.Scalars("signal_residual_rms/layer_0002")] == [1, 4, 7]
    assert [event.step for event in events.Scalars("signal/grad_norm_first")] == list(range(1, 8))


def test_no_hook_stays(data: Path, tmp_path: Path) -> None:
    _, trainer = train(small_config(data, tmp_path, 2))
    for module in trainer.engine.chunks[0].modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


class Damage(Callback):
    """Makes the second layer's feed-forward output 40 times as large for one forward pass."""

    def before_step(self, trainer: Any) -> None:
        if trainer.step == 14:
            for named in trainer.engine.parameters:
                if named.name == "decoder.layers.1.mlp.linear_fc2.weight":
                    named.parameter.data.mul_(40.0)


def test_a_warning_names_the_layer_that_departs(data: Path, tmp_path: Path) -> None:
    lines, _ = train(small_config(data, tmp_path, 15), Damage())
    warnings = [line for line in lines if line["event"] == "warning"]
    assert warnings
    assert {line["step"] for line in warnings} <= {14, 15}
    # From that layer on the stream is as large as the branch; above it other branches are small.
    first = [line["message"] for line in warnings if line["step"] == 14]
    for kind in ("residual_rms", "forward_variance"):
        assert any(message.startswith(f"layer 2: {kind}") for message in first), first
    assert any("branch_ratio_mlp" in message for message in first), first


def test_a_sound_run_warns_of_nothing(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, 40, scheme="deepscalelm_pre_ln")
    config.schedule.warmup_steps = 10
    lines, _ = train(config)
    assert [line["message"] for line in lines if line["event"] == "warning"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "warned"), [("b2t", True), ("pre_ln", False)])
def test_a_deep_stack_that_forgets_is_told_of_while_its_loss_still_falls(
    data: Path, tmp_path: Path, scheme: str, warned: bool
) -> None:
    config = small_config(
        data, tmp_path, 20, signal_interval=10, scheme=scheme, num_layers=48, hidden_size=32
    )
    config.optimizer.lr, config.schedule.warmup_steps = 8e-3, 10
    config.train.global_batch_size = config.train.micro_batch_size = 8
    lines, _ = train(config)
    found = [line for line in lines if line["event"] == "warning" and "forgets" in line["message"]]
    assert len(found) == warned
    if warned:
        losses = [line["loss"] for line in lines if line["event"] == "train"]
        assert found[0]["step"] == 10
        assert losses[-1] < losses[9] - 0.3
        assert "model.scheme_options.branch: 2" in found[0]["message"]


def test_under_a_cuda_graph_only_fully_measured_steps_run_without_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values as without a graph.

    The sizes of streams, which take hooks, are there at fully measured steps only.
    """
    monkeypatch.setattr("pretrain.train.compiling.check_graphs", lambda seq_length: None)
    without, _ = train(small_config(data, tmp_path / "without", 12, signal_interval=7))
    config = small_config(data, tmp_path / "with", 12, signal_interval=7)
    config.train.cuda_graph = True
    with emulated() as graphs:
        lines, _ = train(config)
    assert (graphs.captures, graphs.replays) == (
        2,
        12 - 3 - 3,
    )  # steps 1, 7 and 12 are measured; three others warm up
    by_step = {line["step"]: line for line in without if line["event"] == "train"}
    steps = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in steps if "graph_capture_s" in line] == [5, 8]
    for line in steps:
        expected = by_step[line["step"]]
        assert (line["loss"], line["grad_norm"]) == (expected["loss"], expected["grad_norm"])
        present = {
            key: value
            for key, value in expected["signal"].items()
            if line["step"] in (1, 7, 12) or not key.startswith("residual_rms")
        }
        assert line["signal"] == present
    assert [line for line in lines if line["event"] == "signal"] == [
        line | {"time": ours["time"]}
        for line, ours in zip(
            (line for line in without if line["event"] == "signal"),
            (line for line in lines if line["event"] == "signal"),
            strict=True,
        )
    ]
