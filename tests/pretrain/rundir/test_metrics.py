"""metrics.jsonl survives kills, resumes and numbers that are none, and refuses damaged files by line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from pretrain.rundir.metrics import MetricsWriter, read_metrics


def lines(*records: dict[str, object] | str) -> str:
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def train(step: int, loss: float, **more: object) -> dict[str, object]:
    return {"event": "train", "time": 100.0 + step, "step": step, "loss": loss, **more}


def test_round_trip_of_every_event(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl") as writer:
        writer.write(
            "start",
            0,
            parameters=10,
            world_size=2,
            layout={"tp": 1, "zero": 1},
            precision="bf16",
            unigram_entropy=6.5,
        )
        writer.write(
            "train",
            1,
            loss=torch.tensor(3.5),
            grad_norm=np.float32(0.5),
            lr=1e-3,
            tokens=64,
            tokens_per_s=10.0,
            step_time_s=6.4,
            data_wait_share=0.1,
            skipped=False,
        )
        writer.write("eval", 1, split="validation", loss=3.25, samples=4, tokens=32)
        writer.write("eval", 1, split="test", loss=3.75, samples=4, tokens=32)
        writer.write(
            "signal",
            1,
            layers=[{"layer": 2, "residual_rms": 2.0}, {"layer": 1, "residual_rms": 1.0, "grad_norm": 0.1}],
        )
        writer.write("checkpoint", 1, seconds=0.25)
        writer.write("warning", 1, message="one")
        writer.write("warning", 1, message="two")
        writer.write("end", 1, reason="finished")
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (start,), (step,), (signal,), (end,) = metrics.starts, metrics.train, metrics.signal, metrics.end
    assert (
        start.parameters,
        start.world_size,
        start.layout["zero"],
        start.precision,
        start.unigram_entropy,
    ) == (10, 2, 1, "bf16", 6.5)
    assert (
        step.step,
        step.loss,
        step.grad_norm,
        step.lr,
        step.tokens,
        step.data_wait_share,
        step.skipped,
    ) == (1, 3.5, 0.5, 1e-3, 64, 0.1, False)
    assert [(event.split, event.loss) for event in metrics.eval] == [("validation", 3.25), ("test", 3.75)]
    assert signal.profile("residual_rms") == ([1, 2], [1.0, 2.0])
    assert signal.profile("grad_norm") == ([1], [0.1])
    assert signal.profile("nothing") == ([], [])
    assert [event.message for event in metrics.warning] == ["one", "two"]
    assert metrics.checkpoint[0].seconds == 0.25
    assert metrics.finished is end
    assert end.reason == "finished"
    assert metrics.step == 1
    assert all(event.time > 1e9 for event in (start, step, signal, end))


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("train", 1, loss=math.nan, grad_norm=torch.tensor(math.inf), lr=0.1)
        writer.write(
            "signal", 1, layers=[{"layer": 1, "residual_rms": 1.0}, {"layer": 2, "residual_rms": -math.inf}]
        )
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["loss"] is None
    assert first["grad_norm"] is None
    assert first["nonfinite"] == ["loss", "grad_norm"]
    assert first["lr"] == 0.1
    assert second["nonfinite"] == ["layers[1].residual_rms"]
    metrics = read_metrics(path)
    assert math.isnan(metrics.train[0].loss)
    assert math.isnan(metrics.train[0].grad_norm)
    assert metrics.signal[0].profile("residual_rms") == ([1], [1.0])


def test_the_last_line_of_a_step_counts_and_order_is_by_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        lines(
            {"event": "start", "time": 100.0, "step": 0},
            train(1, 5.0),
            train(2, 4.0),
            train(3, 3.0),
            train(4, 2.0),
            {"event": "start", "time": 200.0, "step": 1},
            {**train(2, 4.5), "time": 210.0},
            {**train(3, 3.5), "time": 220.0},
        )
    )
    metrics = read_metrics(path)
    assert [(event.step, event.loss) for event in metrics.train] == [(1, 5.0), (2, 4.5), (3, 3.5), (4, 2.0)]
    assert [event.step for event in metrics.starts] == [0, 1]
    assert [event.step for event in metrics.resumes] == [1]
    assert metrics.step == 3
    assert metrics.finished is None
    assert [event.step for event in metrics.settled().train] == [1, 2, 3]
    assert metrics.busy_seconds == pytest.approx(4.0 + 20.0)


def test_an_end_before_a_resume_does_not_finish_the_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"event": "start", "step": 0}, train(1, 5.0), {"event": "end", "step": 1, "reason": "signal"}]
    path.write_text(lines(*records))
    assert getattr(read_metrics(path).finished, "reason", None) == "signal"
    path.write_text(lines(*records, {"event": "start", "step": 1}))
    assert read_metrics(path).finished is None


@pytest.mark.parametrize("cut", [1, 12, 30])
def test_a_line_cut_off_by_a_kill_is_skipped_and_closed_on_reopening(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = lines(train(1, 5.0), train(2, 4.0))
    path.write_text(whole + lines(train(3, 3.0))[:cut])
    assert [event.step for event in read_metrics(path).train] == [1, 2]
    assert read_metrics(path).torn == 1
    with MetricsWriter(path) as writer:
        writer.write("start", 2)
        writer.write("train", 3, loss=2.5)
    metrics = read_metrics(path)
    assert [(event.step, event.loss) for event in metrics.train] == [(1, 5.0), (2, 4.0), (3, 2.5)]
    assert metrics.torn == 1
    assert path.read_text().startswith(whole)
    assert path.read_text().count("\n") == 5


def test_a_complete_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(train(1, 5.0)).rstrip("\n"))
    with MetricsWriter(path) as writer:
        writer.write("train", 2, loss=4.0)
    assert [event.loss for event in read_metrics(path).train] == [5.0, 4.0]


def test_each_event_reaches_the_file_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write("train", 1, loss=1.0)
    assert len(read_metrics(tmp_path / "metrics.jsonl").train) == 1
    writer.close()
    with pytest.raises(ValueError):
        writer.write("train", 2, loss=1.0)


def test_unknown_events_are_ignored_when_read_and_refused_when_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines({"event": "future", "step": 1}, train(1, 5.0, another_key=[1])))
    assert len(read_metrics(path).train) == 1
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match="future"):
        writer.write("future", 1)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"event": "train", "st', "no JSON"),
        ("[1, 2]", "event"),
        ('{"event": "train", "step": 2}', "'loss'"),
        ('{"event": "train", "step": "2", "loss": 1.0}', "`step`"),
        ('{"event": "train", "step": 2, "loss": "low"}', "`loss`"),
        ('{"event": "signal", "step": 2, "layers": [1]}', "`layers`"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, bad: str, words: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(train(1, 5.0), bad, train(3, 3.0)))
    with pytest.raises(UserError, match="line 2") as caught:
        read_metrics(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_empty_file_has_no_events(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.starts == metrics.train == ()
    assert metrics.step == 0
    assert metrics.finished is None
    assert metrics.busy_seconds == 0.0
