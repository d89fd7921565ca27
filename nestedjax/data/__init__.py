"""Text data: tokenizers, documents, packing, and data sets indexed by step (the only Grain)."""

from nestedjax.data.dataset import Batch, TextDataset, require_fingerprint, text_dataset
from nestedjax.data.documents import Document, bundled, digest, encode, read_documents, take_split
from nestedjax.data.errors import DataError, DataWarning
from nestedjax.data.files import as_text, expand, file_names, read_file, reading
from nestedjax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataError",
    "DataWarning",
    "Document",
    "SentencePieceTokenizer",
    "TextDataset",
    "Tokenizer",
    "as_text",
    "bundled",
    "digest",
    "encode",
    "expand",
    "file_names",
    "read_documents",
    "read_file",
    "reading",
    "require_fingerprint",
    "take_split",
    "text_dataset",
]
