"""Batches of the caller's own: each one is checked, and what is wrong names its step."""

import numpy as np
import pytest

import nestedjax as nj
from nestedjax.data import DataError
from nestedjax.run.data import OwnData, own_batches
from tests.run.tiny import RUN, TRANSFORMER, Counting


class Changing(Counting):
    """Counting rows, and from step 2 on others."""

    def __init__(self, later, **more):
        super().__init__(**more)
        self.later = later

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        return self.later(batch) if step >= 2 else batch


def raising(error):
    def later(batch):
        raise error

    return later


WEIGHT = np.ones((4, 16), np.float32)
LATER = [
    (
        lambda b: {**b, "tokens": b["tokens"] + 16},
        "batch 2: tokens are from 1?[0-9] to 31, and the",
    ),
    (lambda b: {**b, "tokens": b["tokens"] - 1}, "batch 2: tokens are from -1 to 1"),
    (lambda b: {**b, "targets": np.full((4, 16), 16)}, "batch 2: targets are from 16 to 16"),
    (lambda b: {**b, "tokens": b["tokens"] * 1.0}, "batch 2: tokens is float64.*, not integer"),
    (lambda b: {k: v[:2] for k, v in b.items()}, "batch 2 has 2 rows of 16 tokens"),
    (
        lambda b: {**b, "weight": WEIGHT[:3]},
        r"batch 2: weight is \[3, 16\], and tokens have 4 rows",
    ),
    (lambda b: {**b, "weight": 1.0}, r"batch 2: weight is \[\], and tokens have 4 rows"),
    (
        lambda b: {**b, "weight": WEIGHT[:, :5]},
        r"weight is float32\[4, 5\] and was float32\[4, 16\]",
    ),
    (lambda b: {**b, "weight": WEIGHT.astype(int)}, r"weight is int64\[4, 16\] and was float32"),
    (lambda b: {**b, "weight": ["a"] * 4}, "batch 2: weight is <U1.*, not numbers"),
    (lambda b: {**b, "weight": [[1], [1, 2]]}, "batch 2: weight is no array"),
    (lambda b: {**b, "weight": np.full(4, 2**40)}, "weight is from 1099511627776 .* int32 cannot"),
    (lambda b: {k: b[k] for k in ("tokens", "targets")}, "weight is missing and was float32"),
    (lambda b: {**b, "more": WEIGHT}, r"more is float32\[4, 16\] and was missing before"),
    (lambda b: [b], "batch 2 is a list; give a dict of arrays"),
    (raising(KeyError("x")), r"batch 2: the data raised KeyError \('x'\); mend its __getitem__"),
    (raising(OSError("no\ndisk")), r"batch 2: the data raised OSError \(no disk\)"),
]


@pytest.mark.parametrize(("later", "says"), LATER, ids=range(len(LATER)))
def test_every_batch_is_checked(later, says):
    data = OwnData(Changing(later, weight=WEIGHT), vocab=16, shape=(4, 16))
    assert data[0].keys() == data[1].keys() == {"tokens", "targets", "weight"}
    with pytest.raises(DataError, match=says) as caught:
        data[2]
    assert "\n" not in str(caught.value)


def test_a_later_batch_that_is_wrong_ends_training_with_its_step(tmp_path):
    config = nj.run_preset("transformer_nano", {"vocab": 16, **TRANSFORMER}, **RUN)
    with pytest.raises(DataError, match="batch 2: tokens are from"):
        nj.train(config, tmp_path / "run", data=Changing(LATER[0][0]))


def test_where_data_ends_and_where_it_fails():
    class Sized(Counting):
        def __len__(self):
            return 4

        def __getitem__(self, step):
            if step >= 3:
                raise IndexError("list index out of range")
            return super().__getitem__(step)

    data = OwnData(Sized(), vocab=16, shape=(4, 16))
    with pytest.raises(DataError, match="batch 3: the data raised IndexError.*list index"):
        list(data.iterate(0))
    with pytest.raises(DataError, match="the data has 4 batches and.*steps=5"):
        OwnData(Sized(), vocab=16, shape=(4, 16), steps=5)
    with pytest.raises(DataError, match="batch 0: the data raised IndexError"):
        OwnData(_Empty(), vocab=16, shape=(4, 16))[0]


class _Empty:
    fingerprint = "empty"

    def __getitem__(self, step):
        raise IndexError(step)


def test_validation_batches_are_checked_alike():
    batch = Counting()[0]
    for given, says in (
        ({**batch, "tokens": batch["tokens"] + 16}, "validation batch 1: tokens are from"),
        ({**batch, "weight": WEIGHT[:3]}, "validation batch 1: weight is"),
    ):
        with pytest.raises(DataError, match=says):
            own_batches([batch, given], None, 16)
