"""What can go wrong with a checkpoint beside a user's mistake."""

from __future__ import annotations


class SaveError(OSError):
    """A checkpoint was not saved; the older ones are as they were.

    Raised on every process, with the words of the one that failed.
    """
