"""What git says of a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

from model.errors import UserError


def git_output(folder: Path, *arguments: str, timeout_s: float | None = None) -> str | None:
    """What a git command prints.

    None where git is missing, answers with an error or takes longer than `timeout_s`.
    Raises UserError where the checkout belongs to another user, whom git is not told to trust.
    """
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    except subprocess.CalledProcessError as error:
        if "dubious ownership" in error.stderr:
            raise UserError(
                f"git refuses to read {folder}, which belongs to another user: "
                f"run `git config --global --add safe.directory {folder}`"
            ) from None
        return None
    return answer.stdout
