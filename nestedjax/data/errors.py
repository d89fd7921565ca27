"""The one exception of the data pipeline."""


class DataError(ValueError):
    """Something about the data that the caller can fix; the message is one line with the fix."""
