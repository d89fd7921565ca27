"""The exception of the data pipeline, and what it says without one."""

from nestedjax.errors import RunWarning


class DataError(ValueError):
    """Something about the data that the caller can fix; the message is one line with the fix."""


class DataWarning(RunWarning):
    """What was left out of the data, or is taken as it is; the message is one line."""
