"""What one line about a run says, in a console and on a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.words import duration, printable, quantity

if TYPE_CHECKING:
    from pretrain.cluster.status import RunStatus

HEADINGS = ("RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "RESTARTS", "CHECKPOINT", "JOB")
RIGHT = ("STEP", "LOSS", "TOKENS/S", "LEFT", "RESTARTS")
"""Columns of numbers, which end at the same place."""
STATE_WIDTH, NAME_WIDTH = 20, 500
"""Characters shown of a state, of a name and of a job."""


def cells(status: RunStatus) -> dict[str, str]:
    """What the table says of a run, by heading."""
    texts = (
        printable(status.name, NAME_WIDTH),
        printable(status.state, STATE_WIDTH),
        f"{status.step}/{'?' if status.total is None else status.total}",
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.tokens_per_s is None else quantity(status.tokens_per_s),
        "" if status.left_s is None else duration(status.left_s, brief=True),
        str(status.restarts or ""),
        "none"
        if status.checkpoint_step is None
        else f"{status.checkpoint_step}, {duration(status.checkpoint_age_s or 0, brief=True)} ago",
        printable(status.job or "", NAME_WIDTH),
    )
    return dict(zip(HEADINGS, texts, strict=True))
