"""Live progress of a run: a bar on a terminal, spaced lines in a log file."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from model.words import duration, quantity
from pretrain.tasks.task import perplexity

if TYPE_CHECKING:
    from typing_extensions import Self

WINDOW = 100
"""Updates over which the rate is measured.

Long enough that one evaluation or checkpoint hardly moves the time left.
"""
REFRESH_SECONDS = 0.25
LINE_SHARE, LINE_SECONDS, LINE_SECONDS_LATE, LATE = 0.05, 10.0, 60.0, 600.0


class Progress:
    """Shows where a run stands; give it the steps as they finish.

    Only one process of a run should have a mode other than `none`.
    Usable as a context manager, which closes it.

    total_steps: of the whole run.
    start_step: finished before this process began (a resumed run), left out of the rate.
    mode `bar`: redraws two lines in place.
    mode `plain`: writes a line at the first and last step, every 5 % of the run and every 10 s
    (every minute once ten have passed, so that the log of a long run stays readable).
    mode `none`: is silent.
    mode `auto`: a bar where stdout is a terminal, else plain.
    counted: what speeds and losses count, in the singular; perplexities are those of tokens.
    console, clock (seconds): for tests.

    Raises ValueError for another mode.
    """

    def __init__(
        self,
        total_steps: int,
        mode: str = "auto",
        start_step: int = 0,
        *,
        counted: str = "token",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in ("auto", "bar", "plain", "none"):
            raise ValueError(f"log.progress={mode!r} is none of auto, bar, plain, none")
        self.total_steps, self.step, self.counted = total_steps, start_step, counted
        self._console = console or Console()
        self.mode = (
            ("bar" if self._console.is_terminal and not self._console.is_dumb_terminal else "plain")
            if mode == "auto"
            else mode
        )
        self._clock = clock
        self._began = self._shown_at = clock()
        self._shown_step: int | None = None
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW + 1)
        self._evaluation = ""
        self._bar: _Bar | None = None
        if self.mode == "bar":
            self._bar = _Bar(self._console, total_steps, start_step)
            self._bar.start()

    def update(self, step: int, loss: float, grad_norm: float, lr: float, tokens_per_s: float) -> None:
        """One finished step (1-based).

        Mostly takes less than 0.1 ms: drawing is rationed by time.

        loss: nats per token, or what else is counted.
        tokens_per_s: of these, of the whole run.
        """
        if self.mode == "none":
            return
        now = self._clock()
        self.step = step
        # the first step pays for start-up and compilation: the rate begins at its end
        self._marks.append((now, step))
        if not self._due(now):
            return
        numbers = (
            f"loss {loss:.4f}   grad norm {grad_norm:.3g}   lr {lr:.2e}   "
            f"{quantity(tokens_per_s)} {self.counted}s/s"
        )
        if self._bar is not None:
            self._bar.show(step, numbers + self._evaluation, self._left())
        else:
            width = len(str(self.total_steps))
            left = f"   {self._left()} left" if step < self.total_steps else ""
            self._line(
                f"step {step:>{width}}/{self.total_steps}  "
                f"{step / max(1, self.total_steps):4.0%}   {numbers}{left}"
            )
        self._shown_at, self._shown_step = now, step

    def evaluated(
        self, step: int, loss: float, accuracy: float | None = None, top5: float | None = None
    ) -> None:
        """An evaluation after `step` steps; loss as in `update`, accuracy as a share."""
        worth = f" nats per {self.counted}"
        if self.counted == "token":
            worth = f", perplexity {perplexity(loss) or math.inf:.5g}"
        self._evaluation = f"   validation {loss:.4f}"
        right = "" if accuracy is None else f", accuracy {accuracy:.1%}"
        right += "" if top5 is None else f", top 5 {top5:.1%}"
        self.note(f"step {step}: validation loss {loss:.4f}{worth}{right}")

    def note(self, message: str) -> None:
        """A line that stays, above the bar."""
        if self.mode != "none":
            self._line(message)

    def close(self) -> None:
        """Leaves the terminal as it was; the bar's last state stays visible.

        May be called more than once.
        """
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def seconds_left(self) -> float:
        """Expected time to the last step at the rate of the last steps.

        nan before two are known.
        """
        if len(self._marks) < 2 or self._marks[-1][1] <= self._marks[0][1]:
            return math.nan
        (begin, first), (end, last) = self._marks[0], self._marks[-1]
        return (end - begin) / (last - first) * max(0, self.total_steps - last)

    def _due(self, now: float) -> bool:
        if self._shown_step is None or self.step >= self.total_steps:
            return True
        waited = now - self._shown_at
        if self.mode == "bar":
            return waited >= REFRESH_SECONDS
        pause = LINE_SECONDS if now - self._began < LATE else LINE_SECONDS_LATE
        return waited >= pause or self.step - self._shown_step >= max(1.0, LINE_SHARE * self.total_steps)

    def _left(self) -> str:
        seconds = self.seconds_left
        return "?" if math.isnan(seconds) else duration(seconds)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar(Bar):
    """Bar and percentage with the time left, and a line of numbers below."""

    def __init__(self, console: Console, total: int, start: int) -> None:
        self._numbers = Text("waiting for the first step", style="dim")
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]} left"),
        )
        # no refresh thread: it could hold the console's lock at the moment a data worker is forked
        super().__init__(*columns, console=console, auto_refresh=False, expand=True)
        self._task = self.add_task("", total=total, completed=start, left="?")

    def show(self, step: int, numbers: str, left: str) -> None:
        self._numbers = Text(numbers, no_wrap=True, overflow="ellipsis")
        self.update(self._task, completed=step, left=left)
        self.refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self._numbers
