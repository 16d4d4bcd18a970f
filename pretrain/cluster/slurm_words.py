"""What a user says to Slurm: times, numbers of nodes, dependencies, options; checked before Slurm
is asked.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection

from model.errors import UserError
from model.words import printable

MOST_NODES = 65_536
"""More nodes than Slurm manages."""
LONGEST_DAYS = 365

OURS = {
    "account",
    "array",
    "chdir",
    "cpus-per-task",
    "dependency",
    "error",
    "exclusive",
    "job-name",
    "mem",
    "mincpus",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "qos",
    "requeue",
    "signal",
    "tasks-per-node",
    "time",
}
"""Options that the batch script sets, from the call or from a key of the site file."""
OURS_OF_SBATCH = OURS | {"help", "parsable", "test-only", "usage", "version", "wait", "wrap"}
"""With those that would keep sbatch from answering with the number of a job."""
OURS_OF_SRUN = OURS | {"export", "kill-on-bad-exit", "label", "multi-prog", "pty", "wait"}
"""With those that the end of a run, and the environment of its ranks, hang on."""

_DEPENDENCY = re.compile(
    r"singleton|(?:after|afterany|afternotok|afterok|aftercorr|afterburstbuffer)(?::[0-9]+(?:_(?:[0-9]+|\*))?(?:\+[0-9]+)?)+"
)
_TIME = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?")
_NODES = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_OPTION = re.compile(r"--([a-z][a-z0-9-]*)(?:=.*)?")


def parse_nodes(text: str) -> tuple[int, int]:
    """Smallest and largest number of nodes of `N` or `MIN-MAX`.

    Raises UserError for anything else.
    """
    match = _NODES.fullmatch(text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UserError(
            f"--nodes {printable(text)} must be a number of nodes, such as 4, or a range, such as 2-4"
        )
    if high > MOST_NODES:
        raise UserError(f"--nodes {text.strip()} is more than {MOST_NODES}, which is more than Slurm manages")
    return low, high


def parse_time(text: str, said: str) -> int:
    """Seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    said: the time with its name, as the user wrote them.
    Raises UserError for anything else, for 0, which Slurm takes as no limit, and for more than a
    year.
    """
    forms = "give minutes, HH:MM:SS or D-HH:MM:SS"
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{said} is no time limit: {forms}")
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    assert first is not None
    below = [second, third]  # the leading number may be any
    if days is not None:
        seconds = days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        seconds = first * 3600 + (second or 0) * 60 + third
    else:
        seconds = first * 60 + (second or 0)
    if any(part is not None and part > 59 for part in below) or (days is not None and first > 23):
        raise UserError(
            f"{said} is no time limit: minutes and seconds end at 59, hours after days at 23; {forms}"
        )
    if seconds == 0:
        raise UserError(f"{said} is no time limit: Slurm would take it as unlimited; {forms}")
    if seconds > LONGEST_DAYS * 86400:
        raise UserError(f"{said} is more than a year; {forms}")
    return seconds


def check_dependency(text: str) -> None:
    """Raises UserError for what sbatch would not take as a dependency: `afterok:12:13`, several of
    them by `,` or `?`, or `singleton`.
    """
    parts = re.split(r"[,?]", text)
    wrong = next((part for part in parts if not _DEPENDENCY.fullmatch(part)), None)
    if wrong is not None or ("," in text and "?" in text):
        raise UserError(
            f"--dependency {printable(text)} is none: give TYPE:JOB, such as afterok:1234, "
            "several joined by `,` (all of them) or `?` (any), or singleton"
        )


def one_option(text: str, ours: Collection[str]) -> str:
    """The one word of an option such as `--constraint=a100`, without the quotes around its value.

    ours: names of options that are not the user's to set; Slurm also takes the beginning of a name
    for it.
    Raises ValueError for anything else.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{text!r} has a quote that is not closed ({error})") from None
    match = _OPTION.fullmatch(words[0]) if words else None
    if match is None:
        raise ValueError(f"{text!r} must be a long option such as --constraint=a100")
    if len(words) > 1:
        raise ValueError(
            f"{text!r} is more than one word: one option each, "
            "with its value behind `=`, in quotes where that has blanks"
        )
    name = match[1]
    meant = sorted(known for known in ours if known.startswith(name))
    if meant:
        raise ValueError(
            f"{text!r} is set by the batch script itself{'' if name in ours else f' (--{meant[0]})'}: "
            "use the key of the site file or the option of `fathom submit` for it"
        )
    return words[0]
