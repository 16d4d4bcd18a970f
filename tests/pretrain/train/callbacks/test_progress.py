"""Live progress in a log file and on a terminal."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterable

import pytest
from rich.console import Console

from pretrain.train.callbacks.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run(progress: Progress, clock: Clock, steps: Iterable[int], seconds: float = 1.0) -> None:
    for step in steps:
        clock.now += seconds
        progress.update(step, 5.0 - step / 100, 0.5, 3e-4, 12345.0)


def test_plain_lines_at_the_ends_and_every_five_percent(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(100, "plain", clock=clock) as progress:
        run(progress, clock, range(1, 101), seconds=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [*range(1, 100, 5), 100]
    assert lines[1].split() == [
        "step",
        "6/100",
        "6%",
        "loss",
        "4.9400",
        "grad",
        "norm",
        "0.5",
        "lr",
        "3.00e-04",
        "12.3k",
        "tokens/s",
        "9",
        "s",
        "left",
    ]
    assert "left" not in lines[-1]
    assert "100%" in lines[-1]


def test_plain_lines_every_ten_seconds_then_every_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(10**6, "plain", clock=clock)
    run(progress, clock, range(1, 601))
    assert len(capsys.readouterr().out.splitlines()) == 60
    run(progress, clock, range(601, 1201))
    assert 9 <= len(capsys.readouterr().out.splitlines()) <= 11


def test_resumed_run_counts_from_its_step(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    progress = Progress(100, "plain", start_step=90, clock=clock)
    run(progress, clock, [91, 92], seconds=2.0)
    assert progress.seconds_left == pytest.approx(16.0)
    run(progress, clock, range(93, 101))
    out = capsys.readouterr().out
    assert out.startswith("step  91/100")
    assert "step 100/100" in out


def test_time_left_leaves_the_first_step_out_and_shrugs_at_a_pause() -> None:
    clock = Clock()
    progress = Progress(1000, "plain", console=Console(file=io.StringIO()), clock=clock)
    run(progress, clock, [1], seconds=300.0)
    assert math.isnan(progress.seconds_left)
    run(progress, clock, range(2, 202))
    assert progress.seconds_left == pytest.approx(799.0)
    run(progress, clock, [202], seconds=31.0)
    assert 798.0 < progress.seconds_left < 1.35 * 798.0


def test_time_left_when_only_every_tenth_step_is_reported() -> None:
    clock = Clock()
    progress = Progress(100, "plain", console=Console(file=io.StringIO()), clock=clock)
    run(progress, clock, [10, 20], seconds=5.0)
    assert progress.seconds_left == pytest.approx(40.0)


def test_notes_and_evaluations_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "plain") as progress:
        progress.note("saved [bold]step 3[/bold] " + "x" * 200)
        progress.evaluated(3, 2.0)
        progress.evaluated(4, math.nan)
        progress.evaluated(5, 2.0, 0.25)
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first == "saved [bold]step 3[/bold] " + "x" * 200  # neither wrapped nor read as markup
    assert second == "step 3: validation loss 2.0000, perplexity 7.3891"
    assert "nan" in third
    assert fourth == "step 5: validation loss 2.0000, perplexity 7.3891, accuracy 25.0%"


def test_images_are_counted_as_images(capsys: pytest.CaptureFixture[str]) -> None:
    """Their loss is that of a choice of classes, of which nobody asks a perplexity."""
    with Progress(10, "plain", counted="image") as progress:
        progress.update(1, 1.0, 1.0, 1.0, 64.0)
        progress.evaluated(1, 2.0, 0.25, 0.5)
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("   64 images/s   ? left")
    assert second == "step 1: validation loss 2.0000 nats per image, accuracy 25.0%, top 5 50.0%"


def test_none_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "none") as progress:
        progress.update(1, 1.0, 1.0, 1.0, 1.0)
        progress.note("quiet")
        progress.evaluated(1, 1.0)
    assert capsys.readouterr() == ("", "")


def test_auto_is_plain_in_a_file_and_a_bar_on_a_terminal() -> None:
    assert Progress(10, "auto", console=Console(file=io.StringIO())).mode == "plain"
    with Progress(10, "auto", console=Console(file=io.StringIO(), force_terminal=True)) as progress:
        assert progress.mode == "bar"


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="fancy"):
        Progress(10, "fancy")


def drawn(width: int, start_step: int = 0) -> str:
    clock, screen = Clock(), io.StringIO()
    with Progress(
        400,
        "bar",
        start_step,
        console=Console(file=screen, force_terminal=True, width=width, color_system=None),
        clock=clock,
    ) as progress:
        run(progress, clock, range(start_step + 1, 121))
        progress.evaluated(120, 4.0)
        run(progress, clock, [121])
        progress.close()
    return screen.getvalue()


def test_bar_shows_where_the_run_stands() -> None:
    screen = drawn(120, start_step=100)
    assert "step 100/400" in screen
    assert "waiting for the first step" in screen
    *_, bar, numbers = screen.removesuffix("\x1b[?25h").splitlines()
    assert "step 121/400" in bar
    assert "30%" in bar
    assert "4 min 39 s left" in bar
    assert "━" in bar
    assert "loss 3.7900   grad norm 0.5   lr 3.00e-04   12.3k tokens/s   validation 4.0000" in numbers
    assert screen.count("step 120: validation loss 4.0000, perplexity 54.598") == 1
    assert (
        screen.count("\x1b[?25l") == screen.count("\x1b[?25h") == 1
    )  # the cursor is hidden once and given back once


def test_bar_fits_a_narrow_terminal() -> None:
    *_, bar, numbers = drawn(60).removesuffix("\x1b[?25h").splitlines()
    assert "4 min 39 s left" in bar
    assert numbers.rstrip().endswith("…")


@pytest.mark.parametrize("mode", ["bar", "plain"])
def test_an_update_takes_less_than_a_millisecond(mode: str) -> None:
    with Progress(10**7, mode, console=Console(file=io.StringIO(), force_terminal=mode == "bar")) as progress:
        progress.update(1, 1.0, 1.0, 1.0, 1.0)
        begin = time.process_time()
        for step in range(2, 2002):
            progress.update(step, 1.0, 1.0, 1.0, 1.0)
        assert (time.process_time() - begin) / 2000 < 1e-3
