"""Tokenizers stored as SentencePiece's ``.model`` (arXiv 1808.06226)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import sentencepiece

from megapre.data.sidecar import file_digest
from megapre.tokenizers.base import find_specials, refusing
from megapre.tokenizers.huggingface import metaspace


class SentencePieceTokenizer:
    """Reads a ``.model`` file; ValueError when it cannot."""

    type = "SentencePieceTokenizer"

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise ValueError(f"data.tokenizer_model = {path!r} does not exist; a SentencePiece .model is needed.")
        with refusing(f"data.tokenizer_model = {path!r} is no SentencePiece model"):
            self._inner = sentencepiece.SentencePieceProcessor(model_file=path)
            self.vocab_size = int(self._inner.vocab_size())
            eos = int(self._inner.eos_id())
        specials = find_specials(path, self.lookup)
        self.eod = eos if eos >= 0 else specials.eod
        self.mask = specials.mask
        self.digest = file_digest(path)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin or end tokens."""
        with refusing("the tokenizer fails on this text"):
            ids: list[int] = self._inner.encode(text, add_bos=False, add_eos=False)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def texts(self) -> list[bytes | None]:
        """Per id, what it adds to a text; None for control and unused tokens."""
        inner = self._inner
        silent = (inner.is_control, inner.is_unused, inner.is_unknown)
        pieces = ((i, inner.id_to_piece(i)) for i in range(self.vocab_size))
        return [None if any(test(i) for test in silent) else metaspace(piece) for i, piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control tokens appear by name."""
        parts: list[str] = []
        run: list[int] = []
        for token in [int(i) for i in ids]:
            if self._inner.is_control(token):
                parts += [self._inner.decode(run), self._inner.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._inner.decode(run)])

    def lookup(self, name: str) -> int | None:
        """Id of a token, or None."""
        found = int(self._inner.piece_to_id(name))
        return None if not 0 <= found < self.vocab_size or self._inner.is_unknown(found) else found
