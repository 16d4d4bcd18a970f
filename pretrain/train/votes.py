"""What a run is asked for while it trains: signals, files in its folder, clocks.

Votes carry it to all ranks in the step's own all-reduce.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from parallel.launch.exit_codes import ExitCode
from pretrain.config.sections.checkpoint import CheckpointConfig
from pretrain.rundir.lock import HeldFolder
from pretrain.rundir.state import CONTROL, StaleStartError, check_owner
from pretrain.train.stop_signals import StopRequest

SAVE_FILE, EXIT_FILE = "save", "exit"
LOOK_SECONDS, OWNER_SECONDS = 1.0, 10.0

# A vote is a whole number below 2^53, so that sums in fp64 are exact: three flags that rank 0 alone
# sets, and three counts of ranks, 16 bits each.
SAVE, FENCED, LOST, RESTART, LEAVE, FAILED = 1.0, 2.0, 4.0, 8.0, 8.0 * 2**16, 8.0 * 2**32
COUNT = 2**16


@dataclass(frozen=True)
class Verdict:
    """What all ranks do after a step."""

    save: bool
    """A checkpoint now."""
    fenced: bool
    """Another start owns the run directory."""
    lost: bool
    """The run directory was moved or removed."""
    restart: bool
    """Save and leave, to be started again."""
    leave: bool
    """Save and leave for good."""
    failed: bool
    """The save in the background, or what a rank writes beside checkpoints, has failed."""

    @property
    def ends(self) -> bool:
        """Whether this start was asked to end."""
        return self.restart or self.leave


def decision(votes: float) -> Verdict:
    """What the sum of all ranks' votes means. At most 65535 ranks."""
    whole = int(votes)
    restart, leave, failed = (whole // int(flag) % COUNT > 0 for flag in (RESTART, LEAVE, FAILED))
    return Verdict(bool(whole & 1), bool(whole & 2), bool(whole & 4), restart, leave, failed)


class Requests:
    """Gathers what one rank has to say.

    Rank 0 alone looks at files and clocks, files at most once a second.

    began: when the time of `checkpoint.leave_after_minutes` began, by `clock` (seconds).
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        rank: int,
        began: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stop = StopRequest(run_dir)
        self._run_dir, self._config, self._first, self._clock, self._began = (
            run_dir,
            config,
            rank == 0,
            clock,
            began,
        )
        self._saved_at = self._looked = self._checked = clock()
        self._files: set[str] = set()
        self._saving = self._lost = False
        self._stale = ""
        self._folder: HeldFolder | None = None

    def install(self) -> None:
        """Listens to signals.

        Requests by file from before this start are forgotten: whoever made them did not know of it.
        """
        self.stop.install()
        self._folder = HeldFolder(self._run_dir)
        if self._first:
            self._files = {SAVE_FILE, EXIT_FILE}
            self.honoured(save=True, leave=True)
            self._saved_at = self._clock()

    def close(self) -> None:
        """Lets the run directory go."""
        if self._folder is not None:
            self._folder.close()

    def vote(self, failed: bool) -> float:
        """This rank's vote for the coming step. failed: what it writes cannot be written."""
        total = FAILED if failed else 0.0
        if self._first:
            total += self._first_vote()
        code = self.stop.code()
        return total + (LEAVE if code == ExitCode.STOPPED_BY_USER else RESTART if code else 0.0)

    def replaced(self, error: StaleStartError) -> None:
        """Another start owns the run directory: to be told to all ranks with the next vote."""
        self._stale = str(error)

    def whereabouts(self) -> Path | None:
        """Where the run directory is after a decision that says `lost`.

        None where that is not known.
        """
        return self._folder.whereabouts() if self._folder is not None else None

    def stale(self) -> StaleStartError:
        """What to raise after a decision that says `fenced`."""
        return StaleStartError(
            self._stale or f"{self._run_dir} belongs to another start now; this process leaves it alone"
        )

    def save_begins(self) -> None:
        """The minutes to the next save count from here.

        What asked for one is not heard again before this one is done.
        """
        self._saved_at, self._saving = self._clock(), True

    def honoured(self, *, save: bool, leave: bool) -> None:
        """Removes the files of requests that were carried out.

        save: a checkpoint is on disk.
        leave: this start is over.
        """

        self._saving = self._saving and not save
        for name in self._files & ({SAVE_FILE} if save else set()) | self._files & (
            {EXIT_FILE} if leave else set()
        ):
            self._files.discard(name)
            with contextlib.suppress(OSError):
                (self._run_dir / CONTROL / name).unlink(missing_ok=True)

    def _first_vote(self) -> float:
        now, config = self._clock(), self._config
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._files |= {
                name for name in (SAVE_FILE, EXIT_FILE) if (self._run_dir / CONTROL / name).exists()
            }
            self._lost = self._folder is not None and self._folder.lost()
        if EXIT_FILE in self._files:
            self.stop.ask("FILE")
        if config.leave_after_minutes and now - self._began >= 60 * config.leave_after_minutes:
            self.stop.ask("TIME")
        if self._lost:
            return LOST
        if now - self._checked >= OWNER_SECONDS:
            self._checked = now
            # What cannot be read now is told where it matters: at the next save.
            with contextlib.suppress(OSError, UserError):
                try:
                    check_owner(self._run_dir)
                except StaleStartError as error:
                    self.replaced(error)
        minutes = bool(config.minutes) and now - self._saved_at >= 60 * config.minutes
        return (SAVE if not self._saving and (minutes or SAVE_FILE in self._files) else 0.0) + (
            FENCED if self._stale else 0.0
        )
