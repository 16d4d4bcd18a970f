"""The one exception that means: the user can fix this. Commands print it as one line and leave with exit code 2."""


class UserError(ValueError):
    """A mistake in what the user asked for; the message names the key or file, the value, and what to do."""
