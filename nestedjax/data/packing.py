"""Packing documents into rows: pure integer functions that say where every token of an epoch goes.

The *stream* of an epoch is all its documents one after another, each beginning on a multiple of
`align` tokens, with padding between; row `i` is the stream's slots [i L, (i + 1) L). So a document
that begins inside a row does so on a period boundary of every level whose period divides `align`,
and a document that runs over the end of a row goes on in the next one, in a fresh context.
"""

from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """Where the pieces of text lie in one epoch's stream of rows.

    A piece is a document, or the part of one before or behind its cut.

    Attributes:
      slot: int64[pieces], the first slot of each piece, ascending, multiples of `align`.
      first: int64[pieces], the piece's first token in the store of tokens.
      size: int64[pieces], tokens.
      stop: int64[pieces], where the piece's document ends in the store of tokens.
    """

    slot: np.ndarray
    first: np.ndarray
    size: np.ndarray
    stop: np.ndarray


def count_rows(sizes: np.ndarray, *, length: int, align: int, cut: bool) -> int:
    """Rows of an epoch: the same for every epoch, whatever its order and cuts.

    Args:
      sizes: int64[documents], tokens.
      length: tokens of a row.
      align: documents begin on multiples of this many tokens.
      cut: whether documents longer than a row are cut in two (`random_cuts`). With A = `align` the
        pieces of a document cut at r need ceil(r/A) + ceil((n-r)/A) <= ceil(n/A) + 1 units of A
        slots, so one more unit is counted for each.
    """
    units = -(-sizes // align)
    if cut:
        units = units + (sizes > length)
    return int(-(-units.sum() * align // length))


def stable_random(*entropy: int) -> np.random.Philox:
    """A bit generator whose raw output numpy keeps from version to version.

    `np.random.Generator` methods carry no such promise, and a resumed run needs it.
    """
    return np.random.Philox(np.random.SeedSequence(entropy))


def permutation(random: np.random.Philox, size: int) -> np.ndarray:
    """A random order of `size` things, int64[size]."""
    return np.argsort(random.random_raw(size), kind="stable")


def random_cuts(random: np.random.Philox, sizes: np.ndarray, *, length: int) -> np.ndarray:
    """A token in [0, size) for each document longer than a row, and 0 for the others, int64."""
    drawn = random.random_raw(sizes.size) % sizes.astype(np.uint64)
    return np.where(sizes > length, drawn.astype(np.int64), 0)


def lay_out(starts: np.ndarray, *, align: int, cuts: np.ndarray, order: np.ndarray) -> Layout:
    """Lay documents into a stream.

    A document cut at r becomes two pieces, [r, n) and then [0, r). In this way the rows of a long
    document begin at other tokens in every epoch, and no token is lost or repeated.

    Args:
      starts: int64[documents + 1], bounds of the documents in the store of tokens.
      align: a piece begins on a multiple of this many slots.
      cuts: int64[documents], r for each document; 0 leaves it whole.
      order: int64[documents], which document comes first, second ...

    Returns:
      The pieces in the order of their slots.
    """
    begin, stop, cut = starts[:-1][order], starts[1:][order], (starts[:-1] + cuts)[order]
    first = np.stack([cut, begin], axis=1).reshape(-1)
    size = np.stack([stop - cut, cut - begin], axis=1).reshape(-1)
    kept = size > 0
    size = size[kept]
    ends = np.cumsum(-(-size // align) * align)
    return Layout(
        slot=ends - -(-size // align) * align,
        first=first[kept],
        size=size,
        stop=np.repeat(stop, 2)[kept],
    )


def read_rows(
    layout: Layout, tokens: np.ndarray, rows: np.ndarray, *, length: int
) -> dict[str, np.ndarray]:
    """Tokens, targets, mask and resets of some rows.

    Args:
      layout: an epoch's layout.
      tokens: integer[N], the store of tokens.
      rows: int64[B], which rows; rows behind the end of the stream are padding.
      length: tokens of a row, L.

    Returns:
      `tokens` int32[B, L] (0 where padded), `targets` int32[B, L] (the document's next token, also
      across the end of a row), `mask` bool[B, L] (False for padding and for a document's last
      token), `resets` bool[B, L] (True at the first token of a piece; not at the start of a row
      that goes on with a document).
    """
    slots = rows[:, None] * length + np.arange(length)
    piece = np.searchsorted(layout.slot, slots, side="right") - 1
    inside = slots - layout.slot[piece]
    real = inside < layout.size[piece]
    index = layout.first[piece] + inside
    follows = real & (index + 1 < layout.stop[piece])
    last = tokens.size - 1
    return {
        "tokens": np.where(real, tokens[np.minimum(index, last)], 0).astype(np.int32),
        "targets": np.where(follows, tokens[np.minimum(index + 1, last)], 0).astype(np.int32),
        "mask": follows,
        "resets": real & (inside == 0),
    }
