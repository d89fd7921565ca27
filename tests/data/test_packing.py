"""Packing laws, checked on batches whose tokens are all different: no packing code is shared."""

import itertools

import numpy as np
import pytest

from nestedjax.data import DataError, text_dataset


class Numbers:
    """Every byte of every text gets its own id, from 1; 0 can only be padding."""

    size = 2**20
    fingerprint = "numbers"

    def __init__(self):
        self.next, self.documents = 1, []

    def encode(self, text):
        ids = np.arange(self.next, self.next + len(text), dtype=np.int32)
        self.next += len(text)
        self.documents.append(ids.tolist())
        return ids

    def decode(self, tokens):
        raise NotImplementedError


# "X 2" stands for order X with contexts of two rows
ORDERS = ("shuffled", "shuffled 2", "contiguous", "contiguous 2", "once")
CASES = {
    "one long document": [1000],
    "short documents": [3, 17, 5, 1, 64, 33, 8, 2],
    "long and short": [500, 7, 300, 64, 65, 1, 129],
}


@pytest.fixture
def make(tmp_path):
    def make(sizes, **kwargs):
        order, *rows = kwargs.pop("order", "shuffled").split()
        kwargs |= dict(order=order, context_rows=int(rows[0]) if rows else None)
        paths = []
        for i, size in enumerate(sizes):
            paths.append(tmp_path / f"{i}.txt")
            paths[-1].write_bytes(b"x" * size)
        tokenizer = Numbers()
        return text_dataset(paths, tokenizer, **kwargs), tokenizer.documents

    return make


def epochs(dataset, batch, count):
    """The rows of the first epochs, as lists of (token, target or None, reset)."""
    rows = []
    for step in range(-(-dataset.rows * count // batch)):
        b = dataset[step]
        parts = [b[key].tolist() for key in ("tokens", "targets", "mask", "resets")]
        for t, y, m, r in zip(*parts, strict=True):
            row = zip(t, y, m, r, strict=True)
            rows.append([(t, y if m else None, r) for t, y, m, r in row])
    return [rows[i * dataset.rows : (i + 1) * dataset.rows] for i in range(count)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("align", [1, 8, 64])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_an_epoch_holds_every_token_and_every_target_once(make, sizes, align, order):
    dataset, documents = make(sizes, length=64, batch=3, align=align, order=order, seed=5)
    follows = {a: b for d in documents for a, b in itertools.pairwise(d)}
    for rows in epochs(dataset, 3, 1 if order == "once" else 3):
        slots = [slot for row in rows for slot in row]
        seen = [token for token, _, _ in slots if token]
        assert sorted(seen) == list(range(1, sum(sizes) + 1))
        targets = {token: target for token, target, _ in slots if target is not None}
        assert targets == follows
        assert sum(target is not None for _, target, _ in slots) == sum(sizes) - len(sizes)
        assert all(target is None and not reset for token, target, reset in slots if not token)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("align", [1, 8, 64])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_documents_start_aligned_with_a_reset_and_run_on_in_order(make, sizes, align, order):
    dataset, documents = make(sizes, length=64, batch=3, align=align, order=order, seed=5)
    document_of = {token: i for i, d in enumerate(documents) for token in d}
    starts = {d[0] for d in documents}
    for rows in epochs(dataset, 3, 1 if order == "once" else 2):
        for row in rows:
            for place, (token, _, reset) in enumerate(row):
                before = row[place - 1][0] if place else None
                if token in starts:
                    assert reset
                if reset:
                    assert place % align == 0
                elif token and before is not None:
                    # Without a reset a token follows its predecessor: no gap, no other document.
                    assert before == token - 1 and document_of[before] == document_of[token]


def test_contiguous_rows_go_on_where_the_step_before_ended(make):
    dataset, _ = make([1000, 90], length=32, batch=2, align=8, order="contiguous", seed=1)
    steps = dataset.rows // 2
    for step in range(2 * steps):
        batch = dataset[step]
        for lane in range(2):
            first, reset = int(batch["tokens"][lane, 0]), bool(batch["resets"][lane, 0])
            if step % steps == 0:
                assert reset
            elif first and not reset:
                assert first == int(dataset[step - 1]["tokens"][lane, -1]) + 1


@pytest.mark.parametrize("order", ["shuffled", "contiguous"])
def test_contexts_are_fed_in_rows(make, order):
    dataset, _ = make([6000], length=32, batch=2, order=f"{order} 3", seed=1)
    seen = []
    for step in range(dataset.rows // 2):
        batch = dataset[step]
        for lane in range(2):
            tokens, resets = batch["tokens"][lane].tolist(), batch["resets"][lane].tolist()
            if not all(tokens):
                continue
            began = step == 0 or (step + lane) % 3 == 0  # they take turns
            assert resets == [began or tokens[0] == 1, *(token == 1 for token in tokens[1:])]
            if not began and tokens[0] != 1:
                assert tokens[0] == dataset[step - 1]["tokens"][lane, -1] + 1
            if (step + lane) % 3 == 0:
                seen.append((lane, tokens[0]))
    assert len(set(seen)) == len(seen)
    first = [token for lane, token in seen if lane == 0]
    follows = sum(b == a + 96 for a, b in itertools.pairwise(first))
    assert (follows >= len(first) - 3) == (order == "contiguous")  # but where the text was cut
    with pytest.raises(DataError, match="context_rows=3 with order=once"):
        make([1000], length=32, batch=2, order="once 3")


def test_once_reads_in_order_and_fills_the_last_batch_with_masked_rows(make):
    dataset, documents = make([100, 50], length=32, batch=4, order="once")
    tokens = np.concatenate([batch["tokens"].reshape(-1) for batch in dataset])
    assert len(dataset) == 2
    assert tokens[:150].tolist() == sum(documents, [])
    assert not tokens[150:].any()
    assert not dataset[1]["mask"][1:].any()
    with pytest.raises(IndexError, match="step 2"):
        dataset[2]


def test_epochs_and_seeds_differ_and_steps_do_not(make):
    dataset, _ = make([1000], length=64, batch=dataset_rows(1000, 64), seed=1)
    other, _ = make([1000], length=64, batch=dataset_rows(1000, 64), seed=2)
    first, second = dataset[0]["tokens"], dataset[1]["tokens"]
    # Not only the order of the rows differs: the windows do.
    assert not {row.tobytes() for row in first} & {row.tobytes() for row in second}
    assert not np.array_equal(first, other[0]["tokens"])
    again, _ = make([1000], length=64, batch=dataset_rows(1000, 64), seed=1)
    np.testing.assert_array_equal(again[1]["tokens"], second)
    np.testing.assert_array_equal(dataset[0]["tokens"], first)


def dataset_rows(size, length):
    return -(-(size + 1) // length)


@pytest.mark.parametrize("order", ORDERS)
def test_iteration_from_any_step_equals_indexing(make, order):
    dataset, _ = make([700, 30], length=16, batch=4, align=4, order=order)
    for start in (0, 3, 9):
        for step, batch in zip(range(start, start + 3), dataset.iterate(start), strict=False):
            assert batch.keys() == dataset[step].keys()
            for key, value in batch.items():
                np.testing.assert_array_equal(value, dataset[step][key])


@pytest.mark.parametrize("order", ORDERS)
def test_processes_share_out_the_rows_of_one_process(make, order):
    arguments = dict(length=16, batch=4, align=4, order=order, seed=3)
    whole, _ = make([700, 30], **arguments)
    shares = [make([700, 30], **arguments, process_index=i, process_count=2)[0] for i in (0, 1)]
    assert shares[0].fingerprint == shares[1].fingerprint == whole.fingerprint
    for step in range(12):
        for key, value in whole[step].items():
            parts = np.concatenate([share[step][key] for share in shares])
            np.testing.assert_array_equal(parts, value)


def test_the_order_is_pinned(make):
    """A resumed run needs the same batches from every version of numpy and of this package."""
    dataset, _ = make([1000, 40, 300], length=8, batch=2, align=4, seed=7)
    assert dataset[0]["tokens"][:, 0].tolist() == [1332, 17]
    assert dataset[1000]["tokens"][:, 0].tolist() == [895, 567]
