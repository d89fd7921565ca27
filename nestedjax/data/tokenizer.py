"""Tokenizers: text to token ids and back."""

import hashlib
import os
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

from nestedjax.data.errors import DataError


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
        """The text of token ids."""


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
        """The text of byte values; bytes that are no UTF-8 become U+FFFD."""
        return np.asarray(tokens).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model file (BPE or unigram).

    No begin or end token is added: documents are separated by resets.

    Args:
      path: the `.model` file; any path that epath opens.

    Raises:
      DataError: the file does not exist or is no SentencePiece model; or, in `encode`, bytes that
        are no UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        import sentencepiece  # costs start-up time that byte-level runs need not pay

        file = epath.Path(path)
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
                raise DataError(
                    f"the text is not UTF-8 at byte {error.start}; convert it, or use bytes"
                ) from error
        return np.asarray(self._processor.EncodeAsIds(text), np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of token ids."""
        return self._processor.DecodeIds(np.asarray(tokens).astype(int).tolist())
