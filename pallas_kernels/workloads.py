"""Named sizes of one layer: those that the tests compile are those that the benchmark times."""

from typing import NamedTuple


class Heads(NamedTuple):
    """A layer of memories.

    Attributes:
      heads: of a sequence.
      features: of keys, values and queries.
      hidden: units of a deep memory.
    """

    heads: int
    features: int
    hidden: int


# HOPE's presets from 340m on
PRESETS = {
    "340m": Heads(16, 64, 64),
    "760m": Heads(16, 96, 96),
    "1p3b": Heads(16, 128, 128),
}
