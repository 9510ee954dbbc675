"""Tokenizers of Megatron's older vocabulary files: GPT-2's ``vocab.json`` + ``merges.txt``, BERT's ``vocab.txt``."""

from __future__ import annotations

import os

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megapre.data.sidecar import model_digest, model_files
from megapre.tokenizers.base import refusing
from megapre.tokenizers.huggingface import HuggingFaceTokenizer


class GPT2BPETokenizer(HuggingFaceTokenizer):
    """Byte-level BPE (Radford et al. 2019) from ``vocab.json:merges.txt``, or a folder that holds the two."""

    type = "GPT2BPETokenizer"

    def __init__(self, path: str) -> None:
        files = _existing(path, 2, "vocab.json:merges.txt (--vocab-file and --merge-file)")
        with refusing(f"data.tokenizer_model = {path!r} is no byte-level BPE"):
            self._inner = tokenizers.Tokenizer(models.BPE.from_file(*files))
        self._inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._inner.decoder = decoders.ByteLevel()
        if self._inner.token_to_id("<|endoftext|>") is not None:
            self._inner.add_special_tokens(["<|endoftext|>"])
        self._prepare(path, model_digest(path))


class BertWordPieceLowerCase(HuggingFaceTokenizer):
    """WordPiece (arXiv 1810.04805) from ``vocab.txt``, text in lower case without accents."""

    type = "BertWordPieceLowerCase"
    lower = True

    def __init__(self, path: str) -> None:
        (file,) = _existing(path, 1, "vocab.txt (--vocab-file)")
        with refusing(f"data.tokenizer_model = {path!r} is no WordPiece vocabulary"):
            model = models.WordPiece.from_file(file, unk_token="[UNK]")
        self._inner = tokenizers.Tokenizer(model)
        self._inner.normalizer = normalizers.BertNormalizer(lowercase=self.lower)
        self._inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._inner.decoder = decoders.WordPiece()
        names = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
        missing = [name for name in names[:3] if self._inner.token_to_id(name) is None]
        if missing:
            raise ValueError(f"data.tokenizer_model = {path!r} has no {missing[0]} in its vocabulary.")
        self._inner.add_special_tokens([name for name in names if self._inner.token_to_id(name) is not None])
        self._prepare(path, model_digest(path))


class BertWordPieceCase(BertWordPieceLowerCase):
    """WordPiece from ``vocab.txt``, case kept."""

    type = "BertWordPieceCase"
    lower = False


def _existing(path: str, count: int, wanted: str) -> list[str]:
    files = model_files(path)
    if len(files) != count or not all(map(os.path.isfile, files)):
        raise ValueError(f"data.tokenizer_model = {path!r} does not exist; {wanted} is needed.")
    return files
