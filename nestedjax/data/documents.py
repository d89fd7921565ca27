"""Documents out of text files, splits by position, and their tokens."""

import codecs
import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from nestedjax.data.errors import DataError, DataWarning
from nestedjax.data.files import LINES, Files, expand, plain_name, read_file
from nestedjax.data.tokenizer import NotUtf8, Tokenizer

PIECE = 2**20  # bytes looked at at once
# The last tenth of the text is held out: half to validate, half to test.
BOUNDARIES = {"all": (0, 100), "train": (0, 90), "valid": (90, 95), "test": (95, 100)}


class Document(NamedTuple):
    """A text, or a part of one, and where it was found.

    Attributes:
      text: not empty.
      file: its path, as it was named.
      line: of a file with one document a line, from 1; None for others.
      start: bytes of the document before this part.
    """

    text: bytes
    file: str
    line: int | None = None
    start: int = 0

    @property
    def name(self) -> str:
        """The file, and the line."""
        return self.file if self.line is None else f"{self.file} line {self.line}"


def bundled() -> epath.Path:
    """The text that ships with the package: tiny Shakespeare, 1.1 MB, public domain.

    Example:
      >>> bundled().name
      'tinyshakespeare.txt'
    """
    return epath.Path(__file__).parent / "texts" / "tinyshakespeare.txt"


def read_documents(files: Files) -> list[Document]:
    """Read text files into documents.

    A `.jsonl` (or `.ndjson`) file holds one document a line, the string under `"text"`; any other
    file is one document. gzip, bzip2 and xz are unpacked. UTF-16 and UTF-32 with a byte order mark
    become UTF-8, and a mark is dropped; bytes are otherwise kept as they are.

    Args:
      files: one path or several, of files or folders (see `expand`).

    Returns:
      The documents in the order given, none of them empty.

    Warns:
      DataWarning: files were left out of a folder, or two files hold the same.

    Raises:
      DataError: a file is missing, empty, or not of its form.
    """
    documents: list[Document] = []
    known: dict[bytes, str] = {}
    for path in expand(files):
        data, name = read_file(path), str(path)
        same = known.setdefault(hashlib.blake2b(data).digest(), name)
        if same != name and data:
            _warn(f"{name} holds the same text as {same}: what is held out may be trained on")
        if plain_name(name).endswith(LINES):
            read = [Document(text, name, line) for line, text in _json_lines(name, data)]
        else:
            read = [Document(data, name)] if data else []
            if plain_name(name).endswith(".json"):
                _warn(f"{name} is read as one text; name it .jsonl if each line is a document")
        if not read:
            raise DataError(f"file is empty: {name}; give a file with text in it")
        documents.extend(read)
    return documents


def encode(tokenizer: Tokenizer, document: Document) -> np.ndarray:
    """The tokens of a document, integer[tokens].

    Warns:
      DataWarning: it is no UTF-8, or holds NUL bytes, and the tokenizer takes it nevertheless.

    Raises:
      DataError: the tokenizer cannot read it, or made tokens that it does not have.
    """
    try:
        tokens = np.asarray(tokenizer.encode(document.text))
    except NotUtf8 as error:
        raise DataError(
            f"{document.name} is not UTF-8 at byte {document.start + error.byte}; convert it, or"
            " leave out the tokenizer to train on bytes"
        ) from error
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.size:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(
            f"{document.name}: the tokenizer made token {bad}, and its size is {tokenizer.size};"
            " give its true size"
        )
    if b"\0" in document.text:
        _warn(f"{document.file} holds NUL bytes, as no text does; its bytes are taken as they are")
    elif not _is_utf8(document.text):
        _warn(f"{document.file} is not UTF-8 text; its bytes are taken as they are")
    return tokens


def take_split(documents: list[Document], split: str) -> list[Document]:
    """The part of the documents that a split names, by position in their concatenation.

    `train` is the first 90 % of the bytes, `valid` the next 5 %, `test` the last 5 %. A boundary
    inside a document cuts it in two, never inside a UTF-8 character. Positions are bytes, not
    tokens, so that every tokenizer sees the same text.

    Raises:
      DataError: an unknown split.
    """
    if split not in BOUNDARIES:
        raise DataError(f"unknown split {split!r}; use one of {', '.join(BOUNDARIES)}")
    total = sum(len(document.text) for document in documents)
    low, high = (total * percent // 100 for percent in BOUNDARIES[split])
    taken, offset = [], 0
    for document in documents:
        text = document.text
        start = _character(text, min(max(low - offset, 0), len(text)))
        stop = _character(text, min(max(high - offset, 0), len(text)))
        if start < stop:
            taken.append(document._replace(text=text[start:stop], start=document.start + start))
        offset += len(text)
    return taken


def digest(documents: Sequence[Document]) -> str:
    """What tells the texts of documents from any others: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for document in documents:
        found.update(len(document.text).to_bytes(8, "little") + document.text)
    return found.hexdigest()[:16]


def _json_lines(name: str, data: bytes) -> list[tuple[int, bytes]]:
    """The documents of the lines that are not empty, with their numbers."""
    documents = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            nested = " (nested too deep)" if isinstance(error, RecursionError) else ""
            raise DataError(
                f'{name} line {number} is no JSON object with a "text" field{nested}; fix or drop'
                " the line"
            ) from error
        if not isinstance(value, dict) or "text" not in value:
            there = f", only {_some(value)}" if isinstance(value, dict) and value else ""
            raise DataError(
                f'{name} line {number} is no JSON object with a "text" field{there}; fix or drop'
                " the line"
            )
        text = value["text"]
        if not isinstance(text, str):
            found = "null" if text is None else f"of type {type(text).__name__}"
            raise DataError(
                f'{name} line {number}: "text" is not a string but {found}; fix or drop the line'
            )
        if text:
            documents.append((number, text.encode("utf-8", errors="surrogatepass")))
    return documents


def _some(value: dict) -> str:
    names = [repr(key[:20]) for key in list(value)[:4]]
    return ", ".join(names) + (", ..." if len(value) > 4 else "")


def _character(document: bytes, position: int) -> int:
    # UTF-8 continuation bytes are 10xxxxxx; at most three follow a first byte, so text that is
    # not UTF-8 moves a boundary by three bytes at most.
    for _ in range(3):
        if position < len(document) and 0 < position and document[position] & 0xC0 == 0x80:
            position += 1
    return position


def _is_utf8(text: bytes) -> bool:
    if text.isascii():
        return True
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:  # in pieces: whole, it would take several times the memory of the text
        for start in range(0, len(text), PIECE):
            decoder.decode(text[start : start + PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)
