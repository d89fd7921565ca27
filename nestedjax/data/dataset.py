"""A text data set indexed by step: `dataset[step]` is that step's batch, whatever came before.

Position in the data is therefore the step and nothing else, and a run continues anywhere.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np

from nestedjax.data import packing
from nestedjax.data.documents import Document, digest, encode, read_documents, take_split
from nestedjax.data.errors import DataError
from nestedjax.data.files import Files
from nestedjax.data.tokenizer import Tokenizer

ORDERS = ("shuffled", "contiguous", "once")
Batch = dict[str, np.ndarray]
Fingerprint = dict[str, Any]  # a JSON object

ENDLESS = 2**53  # steps; Grain wants a length
FORMAT = 1  # raised when the same arguments begin to give other batches


class TextDataset:
    """Batches of packed text by step; make one with `text_dataset`.

    Attributes:
      fingerprint: everything that decides the batches, as a JSON object; compare it with
        `require_fingerprint` before a run continues.
      rows: rows of an epoch.
      tokens: tokens of the split.
      bytes: bytes of the split's text (for bits per byte).
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        *,
        length: int,
        batch: int,
        seed: int,
        align: int,
        order: str,
        context_rows: int | None,
        process: tuple[int, int],
        fingerprint: Fingerprint,
        size_bytes: int,
    ):
        sizes = np.array([document.size for document in documents], np.int64)
        self._store = np.concatenate(documents)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._length, self._batch, self._seed = length, batch, seed
        self._align, self._order, self._process = align, order, process
        # Rows that share one context, one in each step; None: a context ends with its document.
        self._context = 1 if context_rows is None and order == "shuffled" else context_rows
        self._epochs: dict[int, tuple[packing.Layout, np.ndarray]] = {}
        self.fingerprint = fingerprint
        self.tokens = int(sizes.sum())
        self.bytes = size_bytes
        cut = order != "once"
        rows = packing.count_rows(sizes, length=length, align=align, cut=cut)
        # All lanes advance by a row in every step, so they have the same length in whole contexts.
        self._lanes = order == "contiguous" or (order == "shuffled" and self._context != 1)
        lane = batch * (self._context or 1)
        self.rows = -(-rows // lane) * lane if self._lanes else rows
        steps = -(-self.rows // batch) if order == "once" else ENDLESS
        self._map = grain.MapDataset.range(steps).map(self._read)

    def __len__(self) -> int:
        """Steps: one pass for `once`; 2**53 for the endless orders."""
        return len(self._map)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step (from 0): this process's rows of it.

        Raises:
          IndexError: a step before 0, or behind the end of a single pass.
        """
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is not in [0, {len(self)})")
        return self._map[step]

    def __iter__(self) -> Iterator[Batch]:
        """All batches from step 0."""
        return self.iterate(0)

    def iterate(self, start: int, *, ahead: int = 4) -> Iterator[Batch]:
        """Batches from a step on, read by a background thread.

        Args:
          start: the first step.
          ahead: batches kept ready.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        return iter(self._map[start:].to_iter_dataset(options)) if start < len(self) else iter(())

    def _epoch(self, epoch: int) -> tuple[packing.Layout, np.ndarray]:
        """The layout of an epoch, and the row at each place of it."""
        found = self._epochs.get(epoch)
        if found is None:
            sizes = np.diff(self._starts)
            random = packing.stable_random(self._seed, epoch)
            if self._order == "once":
                cuts, documents = np.zeros_like(sizes), np.arange(sizes.size)
            else:
                cuts = packing.random_cuts(random, sizes, length=self._length)
                documents = packing.permutation(random, sizes.size)
            layout = packing.lay_out(self._starts, align=self._align, cuts=cuts, order=documents)
            rows = np.arange(self.rows)
            if self._order == "shuffled":
                assert self._context is not None
                contexts = packing.permutation(random, self.rows // self._context)
                rows = rows.reshape(-1, self._context)[contexts].reshape(-1)
            if self._lanes:
                rows = self._in_lanes(rows)
            found = layout, rows
            # Two epochs are enough: a batch rarely reaches further than into the next one.
            kept = {k: v for k, v in self._epochs.items() if abs(k - epoch) < 2}
            self._epochs = {**kept, epoch: found}
        return found

    def _in_lanes(self, rows: np.ndarray) -> np.ndarray:
        """Rows by step, so that row i of a step goes on with row i of the step before."""
        lanes = rows.reshape(self._batch, -1)
        if self._context:  # the lanes take turns in beginning a context
            turns = np.arange(self._batch)[:, None] + np.arange(lanes.shape[1])
            lanes = np.take_along_axis(lanes, turns % lanes.shape[1], axis=1)
        return lanes.T.reshape(-1)

    def _read(self, step: int) -> Batch:
        index, count = self._process
        share = self._batch // count
        places = np.arange(share) + (int(step) * self._batch + index * share)
        read = partial(packing.read_rows, tokens=self._store, length=self._length)
        if self._order == "once":
            layout, rows = self._epoch(0)
            # Places after the last row lie after the end of the stream, where all is padding.
            return read(layout, rows=places)
        parts = []
        for epoch in np.unique(places // self.rows):
            layout, rows = self._epoch(int(epoch))
            inside = places[places // self.rows == epoch] % self.rows
            part = read(layout, rows=rows[inside])
            if self._lanes:
                # Every lane begins a new context at an epoch's first step, even inside a document.
                anew = inside < self._batch
                if self._context:
                    anew |= rows[inside] % self._context == 0
                part["resets"][:, 0] |= anew & part["mask"].any(axis=1)
            parts.append(part)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def text_dataset(
    files: Files | Sequence[Document],
    tokenizer: Tokenizer,
    *,
    length: int,
    batch: int,
    seed: int = 0,
    align: int = 1,
    split: str = "all",
    order: str = "shuffled",
    context_rows: int | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> TextDataset:
    """Make a data set of next-token batches from text files.

    Documents are packed into rows (see `nestedjax.data.packing`): each begins on a multiple of
    `align` tokens of its row, `resets` marks its first token, and no target crosses from one
    document into another. Each epoch holds every token once.

    Args:
      files: one path or several, of files or folders (see `read_documents`); or documents.
      tokenizer: encodes the text.
      length: tokens of a row.
      batch: rows of a step, over all processes.
      seed: of the order of the text and of the cuts, in the two endless orders.
      align: the largest in-context period of the model, in tokens; divides `length`.
      split: `all`, or a part by position: `train` 90 %, `valid` 5 %, `test` 5 %.
      order: `shuffled`: endless; every epoch shuffles the contexts and cuts long documents
        elsewhere. `contiguous`: endless; row i of a step goes on where row i of the step before
        ended, for models that carry state from step to step. `once`: one pass in order, the last
        batch filled up with masked rows.
      context_rows: rows that share a context. They come one after another, at the same place of
        successive batches, and the first one begins with a reset. None: a context is one row if
        `shuffled`, and the whole document if `contiguous`.
      process_index: which share of the rows this process reads; default `jax.process_index()`.
      process_count: number of shares; default `jax.process_count()`.

    Returns:
      A `TextDataset`; `dataset[step]` holds `tokens`, `targets` int32[B, L] and `mask`, `resets`
      bool[B, L].

    Raises:
      DataError: what the caller can fix, in one line.

    Example:
      >>> from nestedjax.data import ByteTokenizer, bundled
      >>> dataset = text_dataset(bundled(), ByteTokenizer(), length=64, batch=4, split="train")
      >>> dataset[1000]["tokens"].shape
      (4, 64)
    """
    process = _process(process_index, process_count)
    _check_settings(length, batch, align, order, context_rows)
    if batch % process[1]:
        raise DataError(f"batch={batch} does not divide over {process[1]} processes; change batch")
    parts = take_split(_documents(files), split)
    documents = [tokens for part in parts if (tokens := _encode(tokenizer, part)).size]
    total, needed = sum(document.size for document in documents), 2 if order == "once" else length
    if total < max(needed, 2):
        raise DataError(
            f"the {split} split has {total} tokens, fewer than length={length}; "
            "use a smaller length or more text"
        )
    fingerprint: Fingerprint = {
        "format": FORMAT,
        "text": digest(parts),
        "tokenizer": tokenizer.fingerprint,
        "length": length,
        "batch": batch,
        "seed": seed,
        "align": align,
        "split": split,
        "order": order,
    }
    if context_rows is not None:
        fingerprint["context_rows"] = context_rows
    return TextDataset(
        documents,
        length=length,
        batch=batch,
        seed=seed,
        align=align,
        order=order,
        context_rows=context_rows,
        process=process,
        fingerprint=fingerprint,
        size_bytes=sum(len(part.text) for part in parts),
    )


def _check_settings(length, batch, align, order, context_rows) -> None:
    for name, value in {"length": length, "batch": batch, "align": align}.items():
        if value < 1:
            raise DataError(f"{name}={value} must be at least 1")
    if order not in ORDERS:
        raise DataError(f"unknown order {order!r}; use one of {', '.join(ORDERS)}")
    if length % align:
        nearest = max(align, length // align * align)
        raise DataError(
            f"length={length} is not a multiple of the model's largest in-context period {align}; "
            f"use length={nearest}"
        )
    if context_rows is not None and (order == "once" or context_rows < 1):
        raise DataError(f"context_rows={context_rows} with order={order}: give none, or at least 1")


def require_fingerprint(saved: Fingerprint, current: Fingerprint) -> None:
    """Refuse to continue with another data pipeline than the one saved.

    Args:
      saved: the fingerprint in the checkpoint.
      current: the fingerprint of the data set at hand.

    Raises:
      DataError: they differ; the message names what differs.
    """
    keys = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    if keys:
        changes = ", ".join(f"{key} was {saved.get(key)}, is {current.get(key)}" for key in keys)
        raise DataError(
            f"the data is not what this run was saved with: {changes}; "
            "give the saved values, or start in a new run folder"
        )


def _process(index: int | None, count: int | None) -> tuple[int, int]:
    if index is None or count is None:
        import jax  # only here: the pipeline itself is numpy

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise DataError(f"process_index={index} is not in [0, {count}); fix the launcher")
    return index, count


def _documents(files: Files | Sequence[Document]) -> list[Document]:
    if isinstance(files, list | tuple) and files and isinstance(files[0], Document):
        return list(files)  # type: ignore[arg-type]
    return read_documents(files)  # type: ignore[arg-type]


def _encode(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    # The narrowest type that holds every id: a gigabyte of bytes stays a gigabyte.
    kept = np.uint8 if tokenizer.size <= 2**8 else np.uint16 if tokenizer.size <= 2**16 else None
    tokens = encode(tokenizer, document)
    return tokens.astype(kept) if kept else tokens
