"""metrics.jsonl survives kills, resumes and numbers that are none.

Damaged lines are left out, counted and named.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from pretrain.rundir.metrics import MetricsWriter, newest_checkpoint, read_metrics


def lines(*records: dict[str, object] | str) -> str:
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def train(step: int, loss: float, **more: object) -> dict[str, object]:
    return {"event": "train", "time": 100.0 + step, "step": step, "loss": loss, **more}


def write_every_event(path: Path) -> None:
    with MetricsWriter(path) as writer:
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
        writer.write("end", 1, reason="all steps are done", exit_code=0)


def test_round_trip_of_every_event(tmp_path: Path) -> None:
    write_every_event(tmp_path / "run" / "metrics.jsonl")
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
    assert (end.reason, end.exit_code) == ("all steps are done", 0)
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
def test_a_line_cut_off_by_a_kill_is_skipped_and_made_json_on_reopening(tmp_path: Path, cut: int) -> None:
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
    assert (metrics.torn, metrics.damaged) == (1, 0)
    assert path.read_text().startswith(whole)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[2] == {"event": "torn", "text": lines(train(3, 3.0))[:cut]}
    assert len(records) == 5


def test_torn_lines_of_earlier_versions_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(train(1, 5.0), '{"event": "tr <torn>', train(2, 4.0)))
    metrics = read_metrics(path)
    assert ([event.step for event in metrics.train], metrics.torn, metrics.damaged) == ([1, 2], 1, 0)


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
        ("[" * 100_000, "recursion"),
        ('{"event": "train", "step": 2}', "'loss'"),
        ('{"event": "train", "step": "2", "loss": 1.0}', "`step`"),
        ('{"event": "train", "step": 1e400, "loss": 1.0}', "`step`"),
        ('{"event": "train", "step": -1, "loss": 1.0}', "`step`"),
        ('{"event": "train", "step": 2, "loss": "low"}', "`loss`"),
        ('{"event": "train", "step": 2, "loss": 1e999}', "`loss`"),
        ('{"event": "train", "step": 2, "loss": 1.0, "skipped": "yes"}', "`skipped`"),
        ('{"event": "train", "step": 2, "loss": 1.0, "time": 1e300}', "`time`"),
        ('{"event": "start", "step": 2, "parameters": "many"}', "`parameters`"),
        ('{"event": "start", "step": 2, "layout": [1]}', "`layout`"),
        ('{"event": "start", "step": 2, "precision": 16}', "`precision`"),
        ('{"event": "eval", "step": 2, "loss": 1.0, "split": null}', "`split`"),
        ('{"event": "warning", "step": 2, "message": {}}', "`message`"),
        ('{"event": "end", "step": 2, "exit_code": "0"}', "`exit_code`"),
        ('{"event": "signal", "step": 2, "layers": [1]}', "`layers`"),
    ],
)
def test_a_damaged_line_is_left_out_counted_and_named(tmp_path: Path, bad: str, words: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(train(1, 5.0), bad, train(3, 3.0)))
    metrics = read_metrics(path)
    assert [event.step for event in metrics.train] == [1, 3]
    assert (metrics.damaged, metrics.torn) == (1, 0)
    assert metrics.first_damage.startswith("line 2: ")
    assert words in metrics.first_damage


def test_measurements_stay_in_the_file_until_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    layers = [{"layer": layer, "residual_rms": 1.0 + layer, "grad_norm": 0.1} for layer in range(1, 1001)]
    with MetricsWriter(path) as writer:
        for step in range(1, 101):
            writer.write("signal", step, layers=layers)
    tracemalloc.start()
    metrics = read_metrics(path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 0.05 * path.stat().st_size
    assert [event.step for event in metrics.signal] == list(range(1, 101))
    assert metrics.signal[57].profile("residual_rms") == (
        list(range(1, 1001)),
        [1.0 + layer for layer in range(1, 1001)],
    )
    path.unlink()
    assert metrics.signal[3].profile("residual_rms") == ([], [])


def test_the_newest_checkpoint_is_found_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert newest_checkpoint(path) is None
    path.write_text(
        lines(
            {"event": "checkpoint", "step": 3},
            train(4, 1.0),
            {"event": "checkpoint", "step": 5},
            '{"event": "checkpoint", "st',
        )
    )
    assert newest_checkpoint(path) == 5
    path.write_text(lines(train(4, 1.0)))
    assert newest_checkpoint(path) is None


def test_a_file_that_is_removed_meanwhile_is_begun_anew_with_its_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("start", 0, world_size=2)
        writer.write("train", 1, loss=5.0)
        path.unlink()
        writer.write("train", 2, loss=4.0)
        path.rename(tmp_path / "edited")
        (tmp_path / "other").write_text(lines({"event": "start", "step": 0}, train(1, 5.0)))
        (tmp_path / "other").rename(path)
        writer.write("train", 3, loss=3.0)
    assert [event.step for event in read_metrics(path).train] == [1, 3]
    before = read_metrics(tmp_path / "edited")
    assert ([event.step for event in before.train], before.starts[0].world_size) == ([2], 2)
    assert capsys.readouterr().err.count("metrics.jsonl was removed or replaced while the run trains") == 2


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path: Path, kind: str) -> None:
    path, precious = tmp_path / "metrics.jsonl", tmp_path / "precious"
    precious.write_text("words")
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises((UserError, IsADirectoryError)):
        MetricsWriter(path)
    if kind != "link":
        with pytest.raises(UserError, match="is no regular file: move it away"):
            read_metrics(path)
    assert precious.read_text() == "words"


def test_a_line_that_the_disk_has_no_room_for_leaves_nothing_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with MetricsWriter(path) as writer:
        writer.write("train", 1, loss=5.0)
        whole = path.read_bytes()
        try:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (len(whole) + 20, hard)
            )  # as a disk with room for 20 bytes
            with pytest.raises(OSError, match="File too large") as failed:
                writer.write("train", 2, loss=4.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, ignored)
        assert (failed.value.filename, path.read_bytes()) == (str(path), whole)
        writer.write("train", 3, loss=3.0)
    assert [event.step for event in read_metrics(path).train] == [1, 3]


def test_ends_carry_their_exit_code(tmp_path: Path) -> None:
    """Those of earlier versions, which had none, have the one that belongs to their reason."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("end", 3, reason="loss or gradient is not finite at step 3")
    assert read_metrics(path).end[0].exit_code == 77
    with MetricsWriter(path) as writer:
        writer.write("end", 4, reason="stopped", exit_code=75)
    assert read_metrics(path).end[-1].exit_code == 75


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
