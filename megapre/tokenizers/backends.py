"""Faster libraries for the same ids: gigatoken and tiktoken in the place of Hugging Face's ``tokenizers``.

``auto`` takes the fastest one installed that gives the reference's ids on hostile strings and on the first documents of
the input. One that differs is passed over, loudly: another id here would be another corpus.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson

from megapre.tokenizers.base import Tokenizer, refusing
from megapre.tokenizers.bytelevel import byte_level_vocab, split_pattern

Encode = Callable[[Sequence[str]], "list[Sequence[int] | np.ndarray]"]
"""Ids of several texts, without end-of-document."""
HOSTILE = (
    "",
    " ",
    "\n\n\n  \t x\r\n",
    "a<|endoftext|>b</s><mask>[MASK]<pad>",
    '\\n\\\\ "quoted" \\u0041',
    "é\u0301ß\u1e9eİı",
    "שלום مرحبا 日本語テキスト。한국어",
    "👩\u200d👩\u200d👧\u200d👦🏳\ufe0f\u200d🌈",
    "\x00\x01\x1f\x7f\x85\u00a0\u2028\ufeff\ufffd",
    "don't I'LL we'Ve 'S 'ſ 12345678901 ½²",
    "def f(x):\n        return x\n\n\n",
    "____----====...!!!???",
    "a" * 300,
    "\U0010ffff\U000e0041",
    "  leading and trailing  ",
)
"""Strings on which libraries of the same name have been seen to differ."""


def gigatoken(path: str) -> Encode:
    """By gigatoken, from a ``tokenizer.json``; ImportError or ValueError when it cannot."""
    from gigatoken import Tokenizer as Gigatoken

    content = _read(path)
    content["added_tokens"] = []  # a document that quotes "<|endoftext|>" must not end there
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return _each(Gigatoken.from_json(orjson.dumps(content)).encode)


def tiktoken(path: str) -> Encode:
    """By tiktoken, from a byte-level BPE ``tokenizer.json`` whose ids are in the order of its merges."""
    import tiktoken as library

    content = _read(path)
    ranks, pattern = byte_level_vocab(content), split_pattern(content)
    encoding = library.Encoding("megapre", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return _each(encoding.encode_ordinary)


FAST: MappingProxyType[str, Callable[[str], Encode]] = MappingProxyType({"gigatoken": gigatoken, "tiktoken": tiktoken})
"""Fastest first."""
BACKENDS = ("auto", *FAST, "reference")


def make(name: str, kind: str, path: str) -> Encode:
    """The encoder of a fast back end for a tokenizer of type ``kind``; ValueError when it cannot be had."""
    if kind != "HuggingFaceTokenizer" or not os.path.exists(_json_of(path)):
        raise ValueError(f"--backend {name} reads a tokenizer.json only, which {kind} {path!r} is not.")
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"--backend {name} is not installed: pip install 'megapre[fast]'.")
    with refusing(f"--backend {name} cannot read {path}"):
        return FAST[name](path)


def choose(
    name: str, tokenizer: Tokenizer, path: str, first: Iterable[str], log: Callable[[str], None]
) -> tuple[str, Encode]:
    """The back end that ``name`` stands for, and its encoder: ``auto`` is the fastest that passes the check.

    Raises ValueError when a named back end is missing or gives other ids than the reference.
    """
    if name not in BACKENDS:
        raise ValueError(f"--backend {name} is unknown; the back ends are {', '.join(BACKENDS)}.")
    if name == "reference":
        return name, tokenizer.encode_batch  # type: ignore[return-value]
    texts = [*HOSTILE, *first]
    for candidate in FAST if name == "auto" else (name,):
        try:
            encode = make(candidate, tokenizer.type, path)
        except ValueError as error:
            if name != "auto":
                raise
            if "not installed" not in str(error) and "reads a tokenizer.json only" not in str(error):
                log(f"back end {candidate} is passed over: {error}")
            continue
        problem = differs(encode, tokenizer, texts)
        if not problem:
            return candidate, encode
        if name != "auto":
            raise ValueError(f"--backend {name} gives other ids than the tokenizer itself: {problem}.")
        log(f"WARNING: back end {candidate} gives other ids than the tokenizer itself and is not used: {problem}")
    return "reference", tokenizer.encode_batch  # type: ignore[return-value]


def differs(encode: Encode, tokenizer: Tokenizer, texts: Sequence[str]) -> str:
    """Where ids differ from the reference's; empty when nowhere."""
    try:
        wanted = tokenizer.encode_batch(texts)
    except ValueError as error:
        return f"the tokenizer itself has no ids to compare with: {error}"
    for text, right in zip(texts, wanted):
        try:
            found: Any = list(map(int, encode([text])[0]))
        except ValueError as error:
            return f"{text[:40]!r}: {error}"
        if found != list(right):
            at = next((i for i, (a, b) in enumerate(zip(found, right)) if a != b), min(len(found), len(right)))
            return f"token {at} of {text[:40]!r} is {found[at : at + 1]} where {list(right[at : at + 1])} is right"
    return ""


def _each(encode: Callable[[str], Any]) -> Encode:
    def encode_all(texts: Sequence[str]) -> list[Any]:
        with refusing("the back end fails on this text"):
            return [encode(text) for text in texts]

    return encode_all


def _read(path: str) -> dict[str, Any]:
    with open(_json_of(path), "rb") as file:
        content: dict[str, Any] = orjson.loads(file.read())
    return content


def _json_of(path: str) -> str:
    return os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
