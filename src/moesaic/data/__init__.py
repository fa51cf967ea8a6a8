"""Text from files, the hub or built-in sources, as packed token blocks with their provenance."""

from moesaic.data.blocks import Provenance, TokenBlocks
from moesaic.data.builtin import BUILTINS
from moesaic.data.config import BUILTIN_SOURCES, DataConfig
from moesaic.data.documents import Document
from moesaic.data.duplicates import DuplicateConfig
from moesaic.data.preparing import (
    DataReport,
    DataSplit,
    DomainReport,
    Sides,
    prepare,
    split_documents,
)
from moesaic.data.sources import load_documents, parse_source
from moesaic.data.tokenizing import Tokenizer, tokenizer_fingerprint

__all__ = [
    "BUILTINS",
    "BUILTIN_SOURCES",
    "DataConfig",
    "DataReport",
    "DataSplit",
    "Document",
    "DomainReport",
    "DuplicateConfig",
    "Provenance",
    "Sides",
    "TokenBlocks",
    "Tokenizer",
    "load_documents",
    "parse_source",
    "prepare",
    "split_documents",
    "tokenizer_fingerprint",
]
