"""Text for terminals."""


def printable(text: str) -> str:
    """Text without control characters, which an untrained model draws and terminals obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
