"""Which files are read, what of a folder is left out, and how bytes become text."""

import bz2
import lzma
import os

import numpy as np
import pytest

from nestedjax.data import (
    ByteTokenizer,
    DataError,
    DataWarning,
    Document,
    encode,
    expand,
    file_names,
    read_documents,
    read_file,
    text_dataset,
)


def write(path, data=b"text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_folder_is_read_at_any_depth_and_what_is_left_out_is_said(tmp_path):
    kept = ["B.TXT", "a.txt", "b/deep/c.jsonl.GZ", "b/x.txt", "c.bz2", "d.ndjson"]
    for name in kept:
        write(tmp_path / name, name.encode())
    for name in (".a.txt", "._a.txt", ".git/b.txt", "photo.jpg", "notes.md"):
        write(tmp_path / name)
    (tmp_path / "b" / "above").symlink_to(tmp_path)  # a loop
    says = r"2 not text \(notes.md, photo.jpg\), 3 hidden \(._a.txt, .a.txt, .git\); name a file"
    with pytest.warns(DataWarning, match=says):
        found = expand(tmp_path)
    assert [os.fspath(path.relative_to(tmp_path)) for path in found] == kept
    assert [path.name for path in expand(tmp_path / ".a.txt")] == [".a.txt"]


def test_a_folder_whose_text_cannot_be_unpacked_is_refused(tmp_path):
    write(tmp_path / "a.txt")
    write(tmp_path / "b.txt.zst")
    with pytest.raises(DataError, match="b.txt.zst is packed in a way that is not read here"):
        expand(tmp_path)


def test_what_is_named_twice(tmp_path):
    a, b = write(tmp_path / "a.txt"), write(tmp_path / "b.txt")
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "c.txt"
    link.symlink_to(a)
    for files in ([a, a], [tmp_path / "other", a], [a, link]):
        with pytest.raises(DataError, match="is named twice.*name it once"):
            expand(files)
    with pytest.warns(DataWarning, match="b.txt holds the same text as .*a.txt: what is held out"):
        assert len(read_documents([a, b])) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be", "utf-8-sig"])
def test_byte_order_marks(tmp_path, encoding):
    text = "naïve 😀\n"
    mark = "\ufeff" if encoding.endswith("be") else ""
    assert read_file(write(tmp_path / "a.txt", (mark + text).encode(encoding))) == text.encode()


def test_what_is_packed_is_known_by_its_name_or_its_bytes(tmp_path):
    for name in ("a.txt.bz2", "a.txt"):
        assert read_file(write(tmp_path / name, bz2.compress(b"text"))) == b"text"
    for name in ("b.txt.XZ", "b"):
        assert read_file(write(tmp_path / name, lzma.compress(b"text"))) == b"text"


def test_json_that_is_not_lines_is_said(tmp_path):
    with pytest.warns(DataWarning, match="a.json is read as one text; name it .jsonl if each"):
        assert read_documents(write(tmp_path / "a.json", b"{}"))[0].text == b"{}"


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"ab\xff" * 9, "is not UTF-8 text; its bytes"), (b"a\0b\0" * 9, "holds NUL bytes")],
)
def test_bytes_that_are_no_text_are_trained_on_as_they_are_and_said(tmp_path, data, says):
    file = write(tmp_path / "a.txt", data)
    with pytest.warns(DataWarning, match=rf"a.txt {says}"):
        dataset = text_dataset(file, ByteTokenizer(), length=4, batch=2)
    assert dataset.tokens == len(data)


def test_a_character_on_the_edge_of_what_is_looked_at_is_whole(monkeypatch):
    monkeypatch.setattr("nestedjax.data.documents.PIECE", 2)
    encode(ByteTokenizer(), Document("€€€".encode(), "a.txt"))  # no warning


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ("", "files='' is no path"),
        (["a", ""], "files='' is no path"),
        ([3], "files=3 is no path"),
        (3, "files=3 is a int; give a path or a list"),
        ({"a": 1}, "is a dict; give a path or a list"),
        ({"a"}, "is a set; give a path or a list"),
        ("https://host/a.txt", "https://host/a.txt is not read from the web; download it"),
        ("hdfs://host/a.txt", "no hdfs:// is read, only gs:// and s3://"),
    ],
)
def test_what_names_no_file(files, says):
    with pytest.raises(DataError, match=says) as caught:
        expand(file_names(files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_whose_library_is_missing_names_the_extra(scheme, monkeypatch):
    def missing(*_):
        raise ImportError("Please install it")

    monkeypatch.setattr("etils.epath.gpath._GPath.is_dir", missing)
    extra = {"gs": "gcs", "s3": "s3"}[scheme]
    with pytest.raises(DataError, match=rf'pip install "nestedjax\[{extra}\]"'):
        expand(f"{scheme}://bucket/a.txt")


def test_the_extras_are_declared():
    import tomllib
    from pathlib import Path

    from nestedjax.data.files import EXTRAS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {*EXTRAS.values()} <= project["optional-dependencies"].keys()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(DataError, match="is no file but a folder, pipe or device"):
            read_documents(path)


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    file = write(tmp_path / "a.txt")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("etils.epath.gpath._GPath.read_bytes", refuse, raising=False)
    with pytest.raises(DataError, match=r"cannot read .*a.txt \(Permission denied\); check"):
        read_documents(file)


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    from nestedjax.data import files

    file, states = write(tmp_path / "a.txt"), iter([(4, 1), (5, 2)])
    monkeypatch.setattr(files, "_state", lambda path: next(states))
    with pytest.raises(DataError, match="a.txt changed while it was read"):
        read_documents(file)


def test_a_tokenizer_that_gives_tokens_it_does_not_have():
    class Wrong(ByteTokenizer):
        def encode(self, text):
            return np.array([1, 256], np.int32)

    with pytest.raises(DataError, match="a.txt: the tokenizer made token 256, and its size is 256"):
        encode(Wrong(), Document(b"ab", "a.txt"))
