"""Files, tokenizers, splits, fingerprints and the errors of the data pipeline."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from nestedjax.data import (
    ByteTokenizer,
    DataError,
    Document,
    SentencePieceTokenizer,
    bundled,
    read_documents,
    require_fingerprint,
    take_split,
    text_dataset,
)

TOKENIZERS = Path(os.environ.get("NESTEDJAX_TEST_DATA", "../shared/data")) / "tokenizers"


def write(path, data):
    path.write_bytes(data)
    return path


def test_files_become_documents(tmp_path):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in ("one", "", "zwei ü\n"))
    plain = write(tmp_path / "a.txt", b"\xef\xbb\xbfplain \xff\n")
    packed = write(tmp_path / "b.txt.gz", gzip.compress(b"pack"))
    objects = write(tmp_path / "c.jsonl", lines.encode() + b"\n")
    objects_packed = write(tmp_path / "d.jsonl.gz", gzip.compress(b'{"text": "x"}'))
    expected = [b"plain \xff\n", b"pack", b"one", "zwei ü\n".encode(), b"x"]
    found = read_documents([plain, str(packed), objects, objects_packed])
    assert [document.text for document in found] == expected
    assert [document.line for document in found] == [None, None, 1, 3, 1]
    assert read_documents(tmp_path) == found
    assert read_documents(str(plain)) == found[:1]
    assert found[0].file == str(plain)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "file is empty: .*empty.txt; give"),
        ("mark.txt", b"\xef\xbb\xbf", "file is empty"),
        ("lines.jsonl", b'\n{"text": ""}\n', "file is empty"),
        ("lines.jsonl", b'{"text": "a"}\n{"txt": 1}', 'line 2 is no JSON object with a "text"'),
        ("lines.jsonl", b"{", "line 1 is no JSON object"),
        ("lines.jsonl", b"[3]", "line 1 is no JSON object"),
        ("lines.jsonl", b'{"text": 3}', 'line 1: "text" is not a string but of type int; fix'),
        ("lines.jsonl", b'{"text": "a"}\n\n{"text": null}', "lines.jsonl line 3: .* but null; fix"),
        ("lines.jsonl", b'{"body": "a", "id": 1}', "line 1 .* field, only 'body', 'id'; fix"),
        ("lines.jsonl", b"[" * 100_000, "line 1 is no JSON .*nested too deep"),
        ("lines.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is no JSON object"),
        ("cut.gz", gzip.compress(b"hello" * 99)[:-9], "no whole gzip file"),
        ("no.gz", b"hello", "no whole gzip file"),
        ("no.bz2", b"hello", "no whole bzip2 file"),
        ("no.xz", b"hello", "no whole xz file"),
        ("a.txt.zst", b"\x28\xb5\x2f\xfd1", "packed by zstd; unpack it with zstd -d"),
        ("a.txt", b"PK\x03\x041", "a.txt is a zip archive; unpack it"),
        ("a.tar.gz", gzip.compress(b"a" * 257 + b"ustar"), "a tar archive"),
        ("a.parquet", b"PAR1 ...", "a parquet file"),
        ("a.txt", b"\xff\xfea", "a.txt is no whole UTF-16"),
    ],
    ids=range(20),
)
def test_files_that_cannot_be_read(tmp_path, name, data, message):
    write(tmp_path / name, data)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match="file not found: .*nowhere.txt; check"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="no text in folder"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match="no text file given"):
        read_documents([])


@pytest.mark.parametrize(
    "texts", [[b"a" * 1000], [b"a" * 7, b"b" * 900, b"c" * 60], ["ü€😀".encode() * 111]]
)
def test_splits_are_consecutive_whole_characters_and_of_the_right_size(texts):
    documents = [Document(text, f"{i}.txt") for i, text in enumerate(texts)]
    taken = {split: take_split(documents, split) for split in ("train", "valid", "test")}
    parts = {split: [part.text for part in found] for split, found in taken.items()}
    joined = b"".join(b"".join(part) for part in parts.values())
    assert joined == b"".join(texts)
    assert take_split(documents, "all") == documents
    for part in sum(taken.values(), []):
        whole = texts[int(part.file[0])]
        assert whole[part.start : part.start + len(part.text)] == part.text
    total = len(joined)
    for split, share in {"train": 0.9, "valid": 0.05, "test": 0.05}.items():
        assert abs(sum(map(len, parts[split])) - share * total) <= 4
        if texts[0][0] > 127:
            assert all(text.decode() for text in parts[split])
    with pytest.raises(DataError, match="unknown split 'dev'"):
        take_split(documents, "dev")


def test_byte_tokenizer():
    tokenizer = ByteTokenizer()
    data = bytes(range(256))
    assert tokenizer.size == 256
    assert tokenizer.encode(data).tolist() == list(range(256))
    assert tokenizer.encode(data).dtype == np.int32
    assert tokenizer.decode(np.array([0xFF, 65])) == "\ufffdA"
    # A model may have more tokens than its tokenizer.
    assert tokenizer.decode(np.array([256, 0xC3, 0xA9, 300, -1])) == "\ufffdé\ufffd\ufffd"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small SentencePiece model made here, so that the tests need no file from outside."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    sentencepiece.SentencePieceTrainer.Train(
        input=str(bundled()), model_prefix=str(prefix), vocab_size=300, model_type="bpe",
        byte_fallback=False, input_sentence_size=2000, shuffle_input_sentence=False,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_sentencepiece_tokenizer(trained, tmp_path):
    tokenizer = SentencePieceTokenizer(trained)
    text = "We are accounted poor citizens, the patricians good."
    tokens = tokenizer.encode(text)
    assert tokenizer.size == 300 and tokens.dtype == np.int32 and tokens.max() < 300
    assert tokenizer.decode(tokens) == text
    np.testing.assert_array_equal(tokenizer.encode(text.encode()), tokens)
    assert tokenizer.fingerprint == SentencePieceTokenizer(str(trained)).fingerprint
    assert tokenizer.decode(np.array([tokens[0], 300])) == "We\ufffd"
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        tokenizer.encode(b"ab\xff")
    file = write(tmp_path / "a.txt", b"a" * 95 + b"\xff" + b"a" * 4)
    with pytest.raises(DataError, match="a.txt is not UTF-8 at byte 95; convert it, or leave out"):
        text_dataset(file, tokenizer, length=2, batch=1, split="test", order="once")
    with pytest.raises(DataError, match="tokenizer file not found"):
        SentencePieceTokenizer(tmp_path / "no.model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        SentencePieceTokenizer(write(tmp_path / "bad.model", b"hello"))


@pytest.mark.parametrize("name", ["mistral_v1_32k.model", "maxtext_default.model"])
def test_published_tokenizers(name):
    if not (TOKENIZERS / name).exists():
        pytest.skip(f"no {name}; set NESTEDJAX_TEST_DATA to a folder with tokenizers/{name}")
    tokenizer = SentencePieceTokenizer(TOKENIZERS / name)
    text = "To be, or not to be: that is the question."
    assert tokenizer.size in (32000, 32768)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_subword_data_set_counts_bytes_and_tokens(trained):
    tokenizer = SentencePieceTokenizer(trained)
    dataset = text_dataset(bundled(), tokenizer, length=32, batch=2, split="test", order="once")
    raw = bundled().read_bytes()
    text = raw[len(raw) * 95 // 100 :]
    assert dataset.bytes == len(text)
    assert dataset.tokens == tokenizer.encode(text).size
    seen = np.concatenate([b["tokens"].reshape(-1) for b in dataset])[: dataset.tokens]
    np.testing.assert_array_equal(seen, tokenizer.encode(text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(length=0, batch=1), "length=0 must be at least 1"),
        (dict(length=8, batch=0), "batch=0 must be at least 1"),
        (dict(length=100, batch=1, align=64), "length=100 is not a multiple .* 64; use length=64"),
        (dict(length=16, batch=1, align=64), "length=16 is not a multiple .* use length=64"),
        (dict(length=8, batch=3, process_index=0, process_count=2), "batch=3 does not divide"),
        (dict(length=8, batch=2, process_index=2, process_count=2), "process_index=2"),
        (dict(length=512, batch=1), "has 100 tokens, fewer than length=512"),
        (dict(length=8, batch=1, split="tost"), "unknown split 'tost'; use one of all, train"),
        (dict(length=8, batch=1, order="sorted"), "unknown order 'sorted'; use one of shuffled"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, arguments, message):
    file = write(tmp_path / "a.txt", b"x" * 100)
    with pytest.raises(DataError, match=message) as caught:
        text_dataset(file, ByteTokenizer(), **arguments)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_every_change(tmp_path):
    def fingerprint(data=b"x" * 200, tokenizer=None, **changes):
        file = write(tmp_path / "a.txt", data)
        arguments = dict(length=16, batch=2, seed=1, align=4, split="train", order="shuffled")
        tokenizer = tokenizer or ByteTokenizer()
        return text_dataset(file, tokenizer, **(arguments | changes)).fingerprint

    saved = fingerprint()
    assert json.loads(json.dumps(saved)) == saved
    require_fingerprint(saved, fingerprint())
    other = ByteTokenizer()
    other.fingerprint = "other"
    changes = [
        dict(data=b"x" * 199 + b"y", split="all"),
        dict(tokenizer=other),
        dict(length=32),
        dict(batch=4),
        dict(seed=2),
        dict(align=8),
        dict(split="all"),
        dict(order="contiguous"),
        dict(context_rows=2),
    ]
    prints = [fingerprint(**change) for change in changes]
    assert len({json.dumps(p) for p in [saved, *prints]}) == len(changes) + 1
    for found in prints:
        with pytest.raises(DataError, match="not what this run was saved with"):
            require_fingerprint(saved, found)
    with pytest.raises(DataError, match="seed was 1, is 2; give the saved values"):
        require_fingerprint(saved, fingerprint(seed=2))
