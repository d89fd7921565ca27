"""Documents out of text files, and splits by position."""

import gzip
import json
import os
import zlib
from collections.abc import Sequence

from etils import epath

from nestedjax.data.errors import DataError

FilePath = str | os.PathLike
Files = FilePath | Sequence[FilePath]

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".gz")
# The last tenth of the text is held out: half to validate, half to test.
BOUNDARIES = {"all": (0, 100), "train": (0, 90), "valid": (90, 95), "test": (95, 100)}


def bundled() -> epath.Path:
    """The text that ships with the package: tiny Shakespeare, 1.1 MB, public domain.

    Example:
      >>> bundled().name
      'tinyshakespeare.txt'
    """
    return epath.Path(__file__).parent / "texts" / "tinyshakespeare.txt"


def expand(files: Files) -> list[epath.Path]:
    """List the files that paths name; a folder stands for its text files in the order of names.

    Raises:
      DataError: a path does not exist, or a folder holds no text file.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else list(files)
    if not paths:
        raise DataError("no text file given; name at least one file or folder")
    found: list[epath.Path] = []
    for path in map(epath.Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
            if not inside:
                raise DataError(
                    f"no text in folder {path}; it needs files named *.txt, .gz, .jsonl"
                )
            found.extend(inside)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"file not found: {path}; check the path")
    return found


def read_documents(files: Files) -> list[bytes]:
    """Read text files into documents.

    A `.jsonl` file holds one document a line, the string under `"text"`; any other file is one
    document. `.gz` files are unpacked. A leading UTF-8 byte order mark is dropped; bytes are
    otherwise kept as they are.

    Args:
      files: one path or several, of files or folders.

    Returns:
      The documents in the order given, none of them empty.

    Raises:
      DataError: a file is missing, empty, or not of its form.
    """
    documents: list[bytes] = []
    for path in expand(files):
        data, name = path.read_bytes(), path.name
        if name.endswith(".gz"):
            try:
                data, name = gzip.decompress(data), name.removesuffix(".gz")
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} is no whole gzip file ({error}); copy it again") from error
        data = data.removeprefix(b"\xef\xbb\xbf")
        read = _json_lines(path, data) if name.endswith(".jsonl") else [data]
        read = [document for document in read if document]
        if not read:
            raise DataError(f"file is empty: {path}; give a file with text in it")
        documents.extend(read)
    return documents


def _json_lines(path: epath.Path, data: bytes) -> list[bytes]:
    documents = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{path} line {number} is no JSON object with a "text" field; fix or drop the line'
            ) from error
        if not isinstance(text, str):
            raise DataError(f'{path} line {number}: "text" is not a string; fix or drop the line')
        documents.append(text.encode("utf-8", errors="surrogatepass"))
    return documents


def take_split(documents: list[bytes], split: str) -> list[bytes]:
    """The part of the documents that a split names, by position in their concatenation.

    `train` is the first 90 % of the bytes, `valid` the next 5 %, `test` the last 5 %. A boundary
    inside a document cuts it in two, never inside a UTF-8 character. Positions are bytes, not
    tokens, so that every tokenizer sees the same text.

    Raises:
      DataError: an unknown split.
    """
    if split not in BOUNDARIES:
        raise DataError(f"unknown split {split!r}; use one of {', '.join(BOUNDARIES)}")
    total = sum(map(len, documents))
    low, high = (total * percent // 100 for percent in BOUNDARIES[split])
    taken, offset = [], 0
    for document in documents:
        start = _character(document, min(max(low - offset, 0), len(document)))
        stop = _character(document, min(max(high - offset, 0), len(document)))
        if start < stop:
            taken.append(document[start:stop])
        offset += len(document)
    return taken


def _character(document: bytes, position: int) -> int:
    # UTF-8 continuation bytes are 10xxxxxx; at most three follow a first byte, so text that is
    # not UTF-8 moves a boundary by three bytes at most.
    for _ in range(3):
        if position < len(document) and 0 < position and document[position] & 0xC0 == 0x80:
            position += 1
    return position
