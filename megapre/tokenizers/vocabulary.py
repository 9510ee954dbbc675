"""What objectives ask of a vocabulary: ids with a meaning of their own, and which tokens continue a word."""

from __future__ import annotations

import base64
from itertools import count, takewhile

import numpy as np

from megapre.data.sidecar import TokenizerRecord
from megapre.tokenizers.base import Tokenizer

NAMES = {
    "cls": ("[CLS]", "<cls>", "<s>", "<|cls|>"),
    "sep": ("[SEP]", "<sep>", "</s>", "<|sep|>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "fim_prefix": ("<fim_prefix>", "<|fim_prefix|>", "<fim-prefix>", "<PRE>"),
    "fim_suffix": ("<fim_suffix>", "<|fim_suffix|>", "<fim-suffix>", "<SUF>"),
    "fim_middle": ("<fim_middle>", "<|fim_middle|>", "<fim-middle>", "<MID>"),
}
"""Usual names of special tokens; the first that exists is taken."""
SENTINEL = "<extra_id_{}>"
"""Tokens that stand for hidden spans, as T5 names them."""
APART = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
"""Scripts without spaces between words (kana and Han): each token is a word, as BERT's are."""


def record(tokenizer: Tokenizer, eod_appended: bool) -> TokenizerRecord:
    """What the sidecar of a pair says of the tokenizer that wrote it."""
    specials = {}
    for meaning, names in NAMES.items():
        found = next((token for name in names if (token := tokenizer.lookup(name)) is not None), None)
        if found is not None:
            specials[meaning] = found
    numbered = (tokenizer.lookup(SENTINEL.format(number)) for number in count())
    sentinels = [token for token in takewhile(lambda token: token is not None, numbered) if token is not None]
    return TokenizerRecord(
        tokenizer.type,
        tokenizer.digest,
        tokenizer.vocab_size,
        tokenizer.eod,
        tokenizer.mask,
        eod_appended,
        specials or None,
        sentinels or None,
        word_bits(tokenizer.texts()),
    )


def word_bits(texts: list[bytes | None]) -> str | None:
    """Two bits an id, base64: whether a word may go on into the token, for all ids; then whether it may go on after it.

    A word goes on between two tokens when the first ends and the second begins in a letter, digit, underscore or part
    of a character. None for a vocabulary without text.
    """
    if not any(texts):
        return None
    bits = np.zeros((2, -(-len(texts) // 8) * 8), np.uint8)
    for token, text in enumerate(texts):
        if text:
            shown = text.decode(errors="replace")
            bits[:, token] = _in_word(shown[0]), _in_word(shown[-1])
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def _in_word(letter: str) -> bool:
    if any(low <= ord(letter) <= high for low, high in APART):
        return False
    return letter.isalnum() or letter in "_\ufffd"
