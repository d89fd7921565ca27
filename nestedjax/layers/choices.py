"""Refusing a word that is not on a menu."""


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a setting whose value is not one of the known words.

    Raises:
      ValueError: it is not; the message shows the value and the words.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
