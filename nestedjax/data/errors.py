"""The exception of the data pipeline, and what it says without one."""


class DataError(ValueError):
    """Something about the data that the caller can fix; the message is one line with the fix."""


class DataWarning(UserWarning):
    """What was left out of the data, or is taken as it is; the message is one line."""
