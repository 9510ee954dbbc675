"""The byte-level alphabet of GPT-2, and a ``tokenizer.json`` of byte-level BPE read as ranks of byte strings."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@lru_cache(maxsize=1)
def alphabet() -> dict[str, int]:
    """Printable character -> byte: printable Latin-1 stands for itself, the others follow from U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{chr(byte): byte for byte in kept}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


def bytes_of_letters(piece: str) -> bytes:
    """The bytes that a piece of byte-level BPE stands for; what is not in the alphabet stands for itself."""
    letters = alphabet()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return piece.encode()


def byte_level_vocab(content: dict[str, Any]) -> dict[bytes, int]:
    """Byte string -> id of a byte-level BPE; ValueError unless the order of ids is the order of merges."""
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer") or model.get("byte_fallback"):
        raise ValueError("it is no plain byte-level BPE")
    letters = alphabet()
    ranks: dict[bytes, int] = {}
    specials = {token["content"] for token in content.get("added_tokens", [])}
    for piece, number in model["vocab"].items():
        if piece not in specials:
            if any(letter not in letters for letter in piece):
                raise ValueError(f"its piece {piece!r} is not in the byte-level alphabet")
            ranks[bytes(letters[letter] for letter in piece)] = number
    merged = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    numbers = [model["vocab"]["".join(pair)] for pair in merged]
    if any(a >= b for a, b in pairwise(numbers)) or len(numbers) + 256 != len(ranks):
        raise ValueError("its ids are not in the order of its merges")
    return ranks


def split_pattern(content: dict[str, Any]) -> str:
    """The regular expression that cuts text into words; ValueError when it is not one expression."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    patterns: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"]["Regex"])
        else:
            raise ValueError(f"its pre-tokenizer {kind} is unknown here")
    if len(patterns) != 1:
        raise ValueError(f"its pre-tokenizer has {len(patterns)} expressions")
    return patterns[0]
