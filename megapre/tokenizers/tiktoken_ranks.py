"""Byte-level BPE from rank files by tiktoken: ``.tiktoken`` lines (OpenAI, Llama 3) or tekken's JSON."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from typing import Any

from megapre.data.sidecar import file_digest
from megapre.tokenizers.base import refusing

SPECIALS = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
"""First special tokens of Megatron's TikTokenizer."""
SPECIAL_COUNT = 1000
"""Ids before the vocabulary, as Megatron reserves them for tekken files."""
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TikTokenizer:
    """Ranks of a file and special tokens around them: before a tekken vocabulary, behind a ``.tiktoken`` one."""

    type = "TikTokenizer"

    def __init__(self, path: str) -> None:
        if not os.path.isfile(path):
            raise ValueError(f"data.tokenizer_model = {path!r} does not exist; a rank file is needed.")
        try:
            import tiktoken
        except ImportError:
            raise ValueError("TikTokenizer needs tiktoken: pip install 'megapre[fast]'.") from None
        with refusing(f"data.tokenizer_model = {path!r} is no rank file"):
            ranks, pattern, first = _read(path)
            lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
            if lacking:
                raise ValueError(f"it has no token for byte {lacking[0]}")
            self._inner = tiktoken.Encoding("megapre", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._first = first
        if first:
            names = [*SPECIALS, *(f"<SPECIAL_{i}>" for i in range(len(SPECIALS), first))]
            self._specials = dict(enumerate(names))
            self.vocab_size = first + len(ranks)
        else:
            self._specials = {len(ranks): "<|endoftext|>", len(ranks) + 1: "<mask>"}
            self.vocab_size = len(ranks) + 2
        numbers = {name: number for number, name in self._specials.items()}
        self.eod = numbers["</s>" if first else "<|endoftext|>"]
        self.mask: int | None = numbers["<mask>"]
        self.digest = file_digest(path)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens that it quotes are ordinary text."""
        with refusing("the tokenizer fails on this text"):
            return [token + self._first for token in self._inner.encode_ordinary(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def lookup(self, name: str) -> int | None:
        """Id of a special token, or None."""
        return next((number for number, found in self._specials.items() if found == name), None)

    def texts(self) -> list[bytes | None]:
        """Per id, the bytes it stands for; None for special tokens."""
        ranks = (None if i in self._specials else i - self._first for i in range(self.vocab_size))
        return [None if rank is None else self._inner.decode_single_token_bytes(rank) for rank in ranks]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens appear by name."""
        parts: list[bytes] = []
        for token in map(int, ids):
            name = self._specials.get(token)
            parts.append(name.encode() if name else self._inner.decode_single_token_bytes(token - self._first))
        return b"".join(parts).decode(errors="replace")


def _read(path: str) -> tuple[dict[bytes, int], str, int]:
    """Ranks, pattern and the number of ids before them."""
    with open(path, "rb") as file:
        content = file.read()
    if content.lstrip()[:1] in (b"{", b"["):
        found: Any = json.loads(content)
        pattern, first, size = TEKKEN_PATTERN, SPECIAL_COUNT, None
        if isinstance(found, dict):
            config = found.get("config", {})
            pattern = config.get("pattern", pattern)
            first = config.get("default_num_special_tokens", first)
            size = config.get("default_vocab_size")
            found = found["vocab"]
        if first <= SPECIALS.index("<mask>"):
            raise ValueError(f"{first} special tokens, which leaves no mask token")
        rows = found[: size - first] if size else found
        return {base64.b64decode(row["token_bytes"]): int(row["rank"]) for row in rows}, pattern, first
    rows = [line.split() for line in content.splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not 0 to the number of tokens - 1")
    return ranks, CL100K_PATTERN, 0
