"""What a run is asked for, and how all ranks come to know."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.launch.exit_codes import ExitCode
from pretrain.config.sections.checkpoint import CheckpointConfig
from pretrain.rundir.state import CONTROL, Owner, claim
from pretrain.train.votes import FAILED, FENCED, LEAVE, LOST, RESTART, SAVE, Requests, Verdict, decision


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def requests(run_dir: Path, clock: Clock, rank: int = 0, **config: float) -> Requests:
    (run_dir / CONTROL).mkdir(exist_ok=True)
    made = Requests(run_dir, CheckpointConfig.model_validate(config), rank, clock.now, clock)
    made._files = {"save", "exit"} if rank == 0 else set()  # as `install`, without its signal handlers
    made.honoured(save=True, leave=True)
    return made


@pytest.mark.parametrize("ranks", [1, 2, 65535])
def test_votes_of_many_ranks_stay_apart(ranks: int) -> None:
    assert decision(0.0) == Verdict(False, False, False, False, False, False)
    assert decision(LOST) == Verdict(False, False, True, False, False, False)
    assert decision(ranks * RESTART) == Verdict(False, False, False, True, False, False)
    assert decision(ranks * LEAVE) == Verdict(False, False, False, False, True, False)
    assert decision(ranks * FAILED) == Verdict(False, False, False, False, False, True)
    everything = SAVE + FENCED + LOST + ranks * (RESTART + LEAVE + FAILED)
    assert decision(everything) == Verdict(True, True, True, True, True, True)
    assert float(int(everything)) == everything < 2**53


def test_a_file_asks_for_a_save_and_goes_when_it_is_done(tmp_path: Path, clock: Clock) -> None:
    asked, file = requests(tmp_path, clock), tmp_path / CONTROL / "save"
    file.touch()
    assert asked.vote(False) == 0, "files are looked at once a second"
    clock.now += 1
    assert asked.vote(False) == SAVE
    asked.save_begins()
    clock.now += 5
    assert asked.vote(False) == 0, "the save is going on"
    assert file.exists()
    asked.honoured(save=True, leave=False)
    assert not file.exists()
    clock.now += 5
    assert asked.vote(False) == 0


def test_a_file_asks_to_leave_for_good(tmp_path: Path, clock: Clock) -> None:
    asked, file = requests(tmp_path, clock), tmp_path / CONTROL / "exit"
    file.touch()
    clock.now += 1
    assert asked.vote(False) == LEAVE
    assert asked.stop.code() == ExitCode.STOPPED_BY_USER
    assert "control/exit" in asked.stop.reason()
    asked.honoured(save=True, leave=False)
    assert file.exists()
    asked.honoured(save=True, leave=True)
    assert not file.exists()


def test_only_rank_0_looks(tmp_path: Path, clock: Clock) -> None:
    asked = requests(tmp_path, clock, rank=1, minutes=1, leave_after_minutes=1)
    for name in ("save", "exit"):
        (tmp_path / CONTROL / name).touch()
    clock.now += 1000
    assert asked.vote(False) == 0
    assert asked.vote(True) == FAILED


def test_requests_from_before_the_start_are_forgotten(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / CONTROL).mkdir()
    (tmp_path / CONTROL / "exit").touch()
    asked = requests(tmp_path, clock)
    clock.now += 2
    assert asked.vote(False) == 0


def test_minutes_count_from_the_last_save(tmp_path: Path, clock: Clock) -> None:
    asked = requests(tmp_path, clock, minutes=2)
    clock.now += 119
    assert asked.vote(False) == 0
    clock.now += 1
    assert asked.vote(False) == SAVE
    asked.save_begins()
    asked.honoured(save=True, leave=False)
    clock.now += 119
    assert asked.vote(False) == 0


def test_leaving_before_the_wall_clock_is_to_be_started_again(tmp_path: Path, clock: Clock) -> None:
    asked = requests(tmp_path, clock, leave_after_minutes=3)
    clock.now += 179
    assert asked.vote(False) == 0
    clock.now += 1
    assert asked.vote(False) == RESTART
    assert asked.stop.code() == ExitCode.STOPPED
    assert asked.stop.reason() == "checkpoint.leave_after_minutes is over"


def test_a_newer_start_is_noticed_between_saves(tmp_path: Path, clock: Clock) -> None:
    claim(tmp_path, Owner(None, 0))
    asked = requests(tmp_path, clock)
    clock.now += 11
    assert asked.vote(False) == 0
    claim(tmp_path, Owner("12", 1))
    clock.now += 11
    assert asked.vote(False) == FENCED
    assert "belongs to start 12.1 now" in str(asked.stale())
