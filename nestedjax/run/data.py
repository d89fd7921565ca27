"""What a run reads: its text files, or batches that the caller made."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from nestedjax.data import (
    Batch,
    ByteTokenizer,
    DataError,
    SentencePieceTokenizer,
    TextDataset,
    Tokenizer,
    bundled,
    read_documents,
    text_dataset,
)
from nestedjax.errors import ConfigError, one_line
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
    data, vocab = config.data, config.model.vocab
    if vocab < tokenizer.size:
        raise ConfigError(
            f"vocab={vocab} is less than the tokenizer's {tokenizer.size} tokens; leave it out, or"
            " give more"
        )
    # Read once: both parts are of the same text, even if a file changes meanwhile.
    documents = read_documents(data.files or bundled())
    common = {"length": data.length, "align": config.model.period}
    train = text_dataset(
        documents,
        tokenizer,
        batch=data.batch,
        seed=config.seed,
        split="train",
        order=data.order,
        context_rows=data.context_rows,
        **common,
    )
    valid = text_dataset(
        documents, tokenizer, batch=data.batch, split="valid", order="once", **common
    )
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
        self._form: dict[str, str] | None = None  # of the first batch that was read

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
          DataError: the data ends before it or raises an error, or the batch is not of its form, or
            not of that of the batches before.
        """
        name = f"batch {step}"
        batch = _fetched(self._batches, step, name)
        found = own_batch(batch, vocab=self._vocab, name=name, period=self._period)
        if found["tokens"].shape != self._shape:
            rows, length = found["tokens"].shape
            raise DataError(
                f"batch {step} has {rows} rows of {length} tokens, and the run takes"
                f" {self._shape[0]} of {self._shape[1]}; give batch={rows}, length={length}"
            )
        form = {key: f"{value.dtype}{list(value.shape)}" for key, value in found.items()}
        self._form = form if self._form is None else self._form
        for key in {**self._form, **form}:
            was, now = self._form.get(key, "missing"), form.get(key, "missing")
            if was != now:
                raise DataError(
                    f"{name}: {key} is {now} and was {was} before; give all batches one form"
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
    return [
        own_batch(_fetched(batches, i, name), vocab=vocab, name=name, period=period)
        for i, name in names
    ]


def _fetched(batches: Any, step: int, name: str) -> Any:
    """What the caller's data gives for a step; its mistakes say at which step.

    Raises:
      DataError: the data ends before, or raised an error.
    """
    try:
        return batches[step]
    except IndexError as error:
        raise DataError(
            f"{name}: the data raised IndexError ({one_line(error)}); if it ends there, give"
            f" steps={step} or endless data, else mend its __getitem__"
        ) from error
    except Exception as error:
        raise DataError(
            f"{name}: the data raised {type(error).__name__} ({one_line(error)}); mend its"
            " __getitem__"
        ) from error


def own_batch(batch: Any, *, vocab: int, name: str, period: int = 1) -> Batch:
    """A batch of the caller's, a mapping of arrays, with the types that the models read.

    Raises:
      DataError: `tokens` or `targets` are missing, of another shape, or no tokens of the model; a
        mask or resets that are not bool; a reset that is not on a multiple of the period; or a
        further array that has another number of rows or holds no numbers.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"{name} is a {type(batch).__name__}; give a dict of arrays")
    found = {key: _array(value, f"{name}: {key}") for key, value in batch.items()}
    for key in ("tokens", "targets"):
        if key not in found:
            raise DataError(f"{name} has no {key!r}, only {', '.join(map(str, found))}; add it")
        value = found[key]
        if not np.issubdtype(value.dtype, np.integer) or value.ndim != 2:
            raise DataError(
                f"{name}: {key} is {value.dtype}{list(value.shape)}, not integer [B, T]"
            )
    shape = found["tokens"].shape
    for key, value in found.items():
        _require_form(key, value, shape, name)
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


def _require_form(key: str, value: np.ndarray, shape: tuple[int, ...], name: str) -> None:
    """Refuse an array of a batch that is not of its form, `shape` being that of the tokens."""
    if key not in BATCH:
        if value.shape[:1] != shape[:1]:
            raise DataError(
                f"{name}: {key} is {list(value.shape)}, and tokens have {shape[0]} rows; give it"
                " one entry a row"
            )
        held = jax.dtypes.canonicalize_dtype(value.dtype)
        if value.dtype.kind in "iu" and held != value.dtype and value.size:
            least, most = np.iinfo(held).min, np.iinfo(held).max
            if value.min() < least or value.max() > most:
                raise DataError(
                    f"{name}: {key} is from {value.min()} to {value.max()}, which {held} cannot"
                    " hold; give floats, or set JAX_ENABLE_X64=1"
                )
        return
    if value.shape != shape:
        raise DataError(f"{name}: {key} is {list(value.shape)}, tokens {list(shape)}")
    if BATCH[key] is np.bool_ and not np.isin(value, (0, 1)).all():
        raise DataError(f"{name}: {key} has values other than 0 and 1; weights belong to the loss")


def _array(value: Any, name: str) -> np.ndarray:
    """A numeric array that a device can hold without changing its numbers."""
    try:
        array = np.asarray(value)
    except Exception as error:
        raise DataError(f"{name} is no array ({one_line(error)}); give an array") from error
    if array.dtype.kind in "OUSmM":
        raise DataError(f"{name} is {array.dtype}{list(array.shape)}, not numbers; give an array")
    return array
