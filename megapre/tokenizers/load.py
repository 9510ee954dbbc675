"""Tokenizers by name. A tokenizer's library is imported only when it is used."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType

from megapre.tokenizers.base import Tokenizer

TOKENIZERS = MappingProxyType(
    {
        "HuggingFaceTokenizer": "megapre.tokenizers.huggingface",
        "SentencePieceTokenizer": "megapre.tokenizers.sentence_piece",
        "GPT2BPETokenizer": "megapre.tokenizers.files",
        "BertWordPieceLowerCase": "megapre.tokenizers.files",
        "BertWordPieceCase": "megapre.tokenizers.files",
        "TikTokenizer": "megapre.tokenizers.tiktoken_ranks",
        "ByteTokenizer": "megapre.tokenizers.plain",
        "NullTokenizer": "megapre.tokenizers.plain",
    }
)


def load(type: str, model_path: str = "", vocab_size: int = 0) -> Tokenizer:
    """The tokenizer of ``data.tokenizer_type`` from ``data.tokenizer_model``.

    ``vocab_size`` is read by NullTokenizer alone: its ids without end-of-document. ValueError on an unknown type,
    a file that cannot be read or one without an end-of-document token.
    """
    if type not in TOKENIZERS:
        raise ValueError(f"data.tokenizer_type = {type!r} is unknown; the types are {', '.join(TOKENIZERS)}.")
    make = getattr(import_module(TOKENIZERS[type]), type)
    if type == "NullTokenizer":
        tokenizer: Tokenizer = make(vocab_size)
    elif type == "ByteTokenizer":
        tokenizer = make()
    elif not model_path:
        raise ValueError(f"{type} needs the path of its file in data.tokenizer_model (--tokenizer-model).")
    else:
        tokenizer = make(model_path)
    return tokenizer
