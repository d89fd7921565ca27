"""Text data: tokenizers, documents, packing, and data sets indexed by step (the only Grain)."""

from nestedjax.data.dataset import Batch, TextDataset, require_fingerprint, text_dataset
from nestedjax.data.documents import bundled, expand, read_documents, take_split
from nestedjax.data.errors import DataError
from nestedjax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataError",
    "SentencePieceTokenizer",
    "TextDataset",
    "Tokenizer",
    "bundled",
    "expand",
    "read_documents",
    "require_fingerprint",
    "take_split",
    "text_dataset",
]
