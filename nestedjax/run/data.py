"""What a run reads: its text files, or batches that the caller made."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nestedjax.data import (
    Batch,
    ByteTokenizer,
    DataError,
    SentencePieceTokenizer,
    TextDataset,
    Tokenizer,
    bundled,
    text_dataset,
)
from nestedjax.errors import ConfigError
from nestedjax.run.config import RunConfig

BATCH = {"tokens": np.int32, "targets": np.int32, "mask": np.bool_, "resets": np.bool_}


@runtime_checkable
class Batches(Protocol):
    """Batches of the caller's own, as `train(data=...)` takes them.

    Attributes:
      fingerprint: what decides the batches: a string, or a mapping that JSON can hold. A run only
        continues on data of the same fingerprint.
    """

    fingerprint: Any

    def __getitem__(self, step: int) -> Mapping[str, Any]:
        """The batch of a step, the same whenever it is asked for.

        `tokens` and `targets`, integers [B, T], a target the token after; and if given `mask`,
        bool [B, T] (which targets count), and `resets`, bool [B, T] (the first token of each
        document that begins inside a row). Further arrays [B, ...] reach the loss.
        """


def tokenizer_of(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run: bytes, or its SentencePiece model."""
    path = config.data.tokenizer
    return ByteTokenizer() if path is None else SentencePieceTokenizer(path)


def text_of(config: RunConfig, tokenizer: Tokenizer) -> tuple[TextDataset, list[Batch]]:
    """The training text of a run, and the batches of a validation pass.

    Raises:
      DataError: a file is missing or empty, or too short for the settings.
      ConfigError: the model has fewer tokens than the tokenizer.
    """
    data, files, vocab = config.data, config.data.files or bundled(), config.model.vocab
    if vocab < tokenizer.size:
        raise ConfigError(
            f"vocab={vocab} is less than the tokenizer's {tokenizer.size} tokens; leave it out, or"
            " give more"
        )
    common = {"length": data.length, "align": config.model.period}
    train = text_dataset(
        files,
        tokenizer,
        batch=data.batch,
        seed=config.seed,
        split="train",
        order=data.order,
        context_rows=data.context_rows,
        **common,
    )
    valid = text_dataset(files, tokenizer, batch=data.batch, split="valid", order="once", **common)
    count = min(len(valid), data.validation_batches or len(valid))
    return train, [valid[step] for step in range(count)]


class OwnData:
    """The caller's batches as the training loop reads them.

    Args:
      batches: see `Batches`.
      vocab: of the model.
      shape: rows and tokens of a batch; the rows of this process.
      period: of the model, in tokens; documents begin on multiples of it.
      steps: of the run, which needs as many batches; data without a `__len__` is taken to be
        endless.

    Raises:
      DataError: there is no fingerprint; or, when a batch is read, it is not of its form.
    """

    def __init__(
        self,
        batches: Any,
        *,
        vocab: int,
        shape: tuple[int, int],
        period: int = 1,
        steps: int = 1,
    ):
        given = getattr(batches, "fingerprint", None)
        if not given:
            raise DataError(
                "the data has no fingerprint; give it one: a string that changes whenever its"
                " batches do"
            )
        if not isinstance(given, Mapping | str):
            raise DataError(f"the data's fingerprint is {given!r}; give a string or a mapping")
        try:  # as a checkpoint will hold it
            self.fingerprint = json.loads(json.dumps({"data": given}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the data's fingerprint cannot be JSON ({error}); simplify it"
            ) from error
        self._batches, self._vocab, self._shape, self._period = batches, vocab, shape, period
        if isinstance(batches, Sized) and len(batches) < steps:
            raise DataError(
                f"the data has {len(batches)} batches and the run takes one for each of its"
                f" steps={steps}; give more of them, or steps={len(batches)}"
            )

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step."""
        name = f"batch {step}"
        try:
            batch = self._batches[step]
        except IndexError as error:
            raise DataError(
                f"{name}: the data raised IndexError ({error}); if it ends there, give steps={step}"
                " or endless data, else mend its __getitem__"
            ) from error
        found = own_batch(batch, vocab=self._vocab, name=name, period=self._period)
        if found["tokens"].shape != self._shape:
            rows, length = found["tokens"].shape
            raise DataError(
                f"batch {step} has {rows} rows of {length} tokens, and the run takes"
                f" {self._shape[0]} of {self._shape[1]}; give batch={rows}, length={length}"
            )
        return found

    def iterate(self, start: int) -> Iterator[Batch]:
        """Batches from a step on, without an end."""
        return map(self.__getitem__, itertools.count(start))


def own_batches(
    batches: Sequence[Mapping[str, Any]], count: int | None, vocab: int, period: int = 1
) -> list[Batch]:
    """The batches of a validation pass out of the caller's: the first `count` of them, or all.

    Raises:
      DataError: it is no sequence, or an empty one.
    """
    if isinstance(batches, Mapping) or not isinstance(batches, Sized) or not len(batches):
        raise DataError(
            f"valid_data is {type(batches).__name__}: give a list of batches, not empty"
        )
    total = min(len(batches), count or len(batches))
    names = ((i, f"validation batch {i}") for i in range(total))
    return [own_batch(batches[i], vocab=vocab, name=name, period=period) for i, name in names]


def own_batch(batch: Mapping[str, Any], *, vocab: int, name: str, period: int = 1) -> Batch:
    """A batch of the caller's with the types that the models read.

    Raises:
      DataError: `tokens` or `targets` are missing, of another shape, or no tokens of the model; a
        mask or resets that are not bool; a reset that is not on a multiple of the period.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"{name} is a {type(batch).__name__}; give a dict of arrays")
    found = {key: _array(value, key, name) for key, value in batch.items()}
    for key in ("tokens", "targets"):
        if key not in found:
            raise DataError(f"{name} has no {key!r}, only {', '.join(found)}; add it")
        value = found[key]
        if not np.issubdtype(value.dtype, np.integer) or value.ndim != 2:
            raise DataError(
                f"{name}: {key} is {value.dtype}{list(value.shape)}, not integer [B, T]"
            )
    shape = found["tokens"].shape
    for key in BATCH.keys() & found.keys():
        if found[key].shape != shape:
            raise DataError(f"{name}: {key} is {list(found[key].shape)}, tokens {list(shape)}")
        if BATCH[key] is np.bool_ and not np.isin(found[key], (0, 1)).all():
            raise DataError(
                f"{name}: {key} has values other than 0 and 1; weights belong to the loss"
            )
    if period > 1 and "resets" in found:
        inside = np.flatnonzero(np.asarray(found["resets"], bool).any(axis=0)) % period
        if inside.any():
            raise DataError(
                f"{name}: a reset stands {inside[inside > 0][0]} tokens after a boundary of the"
                f" model's chunks of {period}; pad documents to whole chunks"
            )
    # A target that does not count may be anything.
    for key, counts in (("tokens", True), ("targets", found.get("mask", True))):
        value = np.where(np.asarray(counts, bool), found[key], found[key].dtype.type(0))
        if value.size and not (value.min() >= 0 and value.max() < vocab):
            raise DataError(
                f"{name}: {key} are from {value.min()} to {value.max()}, and the model's are from 0"
                f" to {vocab - 1}; change vocab"
            )
    for key in BATCH.keys() & found.keys():
        found[key] = found[key].astype(BATCH[key])
    return found


def _array(value: Any, key: str, name: str) -> np.ndarray:
    try:
        found = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: {key} is no array ({error}); give rows of one length") from error
    if found.dtype == object:
        raise DataError(f"{name}: {key} is {type(value).__name__}, not an array of numbers")
    return found
