"""What can end several ranks together, beside a user's mistake. Standard library only."""

from __future__ import annotations


class SaveError(OSError):
    """A checkpoint was not saved; the older ones are as they were.

    Raised on every process, with the words of the one that failed.
    """


class StaleStartError(RuntimeError):
    """This process belongs to an earlier start of the run; a newer one owns the run directory."""


class PeerError(RuntimeError):
    """Another rank met something unexpected, and this one ends with it. The other one says more."""
