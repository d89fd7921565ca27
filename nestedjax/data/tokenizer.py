"""Tokenizers: text to token ids and back."""

import hashlib
import os
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from nestedjax.data.errors import DataError
from nestedjax.data.files import reading

UNKNOWN = "\ufffd"  # the text of a token that the tokenizer does not have


class NotUtf8(DataError):
    """Bytes that are no UTF-8, from `byte` on, for a tokenizer of text."""

    def __init__(self, byte: int):
        super().__init__(f"the text is not UTF-8 at byte {byte}; convert it, or use bytes")
        self.byte = byte


@runtime_checkable
class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer.

    Attributes:
      size: number of token ids; every id is in [0, size).
      fingerprint: identifies the mapping; two tokenizers with equal fingerprints encode alike.
    """

    size: int
    fingerprint: str

    def encode(self, text: bytes | str) -> np.ndarray:
        """Token ids of a text, int32[tokens]."""

    def decode(self, tokens: np.ndarray) -> str:
        """The text of token ids; U+FFFD for each that is not in [0, size)."""


class ByteTokenizer:
    """The 256 byte values; no special tokens, because documents are separated by resets.

    Example:
      >>> tokenizer = ByteTokenizer()
      >>> tokenizer.encode("né").tolist()
      [110, 195, 169]
      >>> tokenizer.decode(tokenizer.encode("né"))
      'né'
    """

    size = 256
    fingerprint = "bytes"

    def encode(self, text: bytes | str) -> np.ndarray:
        """The bytes of `text` (UTF-8 if it is a string) as int32[bytes]."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of byte values; bytes that are no UTF-8, and other numbers, become U+FFFD."""
        return _known_runs(self, np.asarray(tokens), _bytes_to_text)


class SentencePieceTokenizer:
    """A SentencePiece model file (BPE or unigram).

    No begin or end token is added: documents are separated by resets.

    Args:
      path: the `.model` file: local, gs:// or s3://.

    Raises:
      DataError: the file cannot be read or is no SentencePiece model; or, in `encode`, bytes that
        are no UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        import sentencepiece  # costs start-up time that byte-level runs need not pay

        with reading(path) as file:
            if not file.is_file():
                raise DataError(f"tokenizer file not found: {file}; give the path of a .model file")
            model = file.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except Exception as error:
            raise DataError(f"{file} is not a SentencePiece model; give a .model file") from error
        self.size: int = self._processor.GetPieceSize()
        self.fingerprint = "sentencepiece:" + hashlib.sha256(model).hexdigest()[:16]

    def encode(self, text: bytes | str) -> np.ndarray:
        """Token ids of `text`, int32[tokens]."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError as error:
                raise NotUtf8(error.start) from error
        return np.asarray(self._processor.EncodeAsIds(text), np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of token ids; U+FFFD for each that the model file does not have."""
        return _known_runs(self, np.asarray(tokens), self._text)

    def _text(self, tokens: np.ndarray) -> str:
        return self._processor.DecodeIds(tokens.astype(int).tolist())


def _bytes_to_text(tokens: np.ndarray) -> str:
    return tokens.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def _known_runs(tokenizer: Tokenizer, tokens: np.ndarray, text: Callable[[np.ndarray], str]) -> str:
    """The text of tokens, some of which a model may have beyond those of its tokenizer."""
    known = (tokens >= 0) & (tokens < tokenizer.size)
    if known.all():
        return text(tokens)
    runs = np.split(np.arange(tokens.size), np.flatnonzero(np.diff(known)) + 1)
    return "".join(text(tokens[r]) if known[r[0]] else UNKNOWN * r.size for r in runs)
