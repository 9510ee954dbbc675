"""Learn a tokenizer from text files. The same input gives the same file, byte for byte.

Every type falls back to bytes, so text survives encoding and decoding, and holds the special tokens
``<|endoftext|>``, ``<mask>`` and ``<pad>``. One exception: SentencePiece writes spaces as U+2581, so a U+2581 in the
text comes back as a space.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megapre.data.order import derive_key, permute
from megapre.tokenizers.base import Tokenizer
from megapre.tokenizers.documents import BadLine, batches
from megapre.tokenizers.inputs import cut

SPECIALS = ("<|endoftext|>", "<mask>", "<pad>")
TYPES = ("bpe", "unigram", "wordpiece")
PIECE = 1 << 20
"""Bytes of input that a sample is drawn by."""
SMALLEST = 256 + len(SPECIALS) + 1


def train(
    inputs: Sequence[str],
    output: str,
    *,
    type: str = "bpe",
    backend: str = "tokenizers",
    vocab_size: int = 32_000,
    key: str = "text",
    bad: Callable[[BadLine], None] | None = None,
    sample_bytes: int = 0,
    seed: int = 1234,
    specials: Sequence[str] = (),
) -> int:
    """Learn from the texts of ``inputs`` and write ``output``; the number of ids it holds.

    ``specials`` names special tokens beside the three that every tokenizer has; they are part of ``vocab_size``.

    With ``sample_bytes`` only about as many bytes of text are read, from places all over the input.

    BPE: arXiv 1508.07909, Unigram: arXiv 1804.10959, WordPiece: arXiv 1609.08144. Each bad line is given to ``bad``.
    Raises ValueError on a type the backend lacks, a vocabulary below 260 ids or text too small for it.
    """
    if type not in TYPES:
        raise ValueError(f"--type {type} is unknown; the types are {', '.join(TYPES)}.")
    names = [*SPECIALS, *specials]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"--special-tokens {' '.join(specials)} holds an empty name, or one that is there already.")
    if vocab_size < SMALLEST + len(specials):
        smallest = SMALLEST + len(specials)
        raise ValueError(f"--vocab-size {vocab_size} is below {smallest}, the 256 bytes and the special tokens.")
    texts = sample_texts(inputs, key, bad, sample_bytes, seed)
    if backend == "tokenizers":
        data, size = _train_huggingface(texts, type, vocab_size, names)
    elif backend == "sentencepiece" and type != "wordpiece":
        data, size = _train_sentencepiece(texts, type, vocab_size, names)
    else:
        raise ValueError(f"--backend {backend} does not train --type {type}; tokenizers does.")
    temporary = f"{output}.tmp-{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, output)
    return size


def sample_texts(
    inputs: Sequence[str],
    key: str,
    report: Callable[[BadLine], None] | None,
    wanted: int = 0,
    seed: int = 1234,
    held_out: bool = False,
) -> Iterator[str]:
    """Texts of about ``wanted`` bytes (0: all, in order) of pieces drawn by ``seed``; ``held_out``: of other pieces.

    Plain files are drawn by the MiB, packed ones whole. The order of pieces is a keyed permutation: the held-out ones
    are the last, so the two meet only when the input is smaller than both.
    """
    pieces = cut(inputs, PIECE if wanted else 0)
    order = [permute(n, len(pieces), derive_key(seed)) for n in range(len(pieces))] if wanted else range(len(pieces))
    held, empty = 0, True
    for number in reversed(order) if held_out else order:
        for span in pieces[number].spans:
            for batch in batches(span, [key]):
                for line, reason in batch.bad:
                    where = BadLine(span.path, line if not span.start else 0, reason)
                    if report is None:
                        raise ValueError(f"{where}.")
                    report(where)
                for (text,) in batch.texts:
                    empty = empty and not text
                    held += len(text)
                    yield text
                if wanted and held >= wanted:
                    return
    if empty:
        raise ValueError(f"--input holds no text to learn from under the key {key!r}.")


def fertility(tokenizer: Tokenizer, texts: Iterator[str]) -> dict[str, float]:
    """How finely a tokenizer cuts text: tokens per word (arXiv 2012.15613), words in one token, bytes per token."""
    words = whole = pieces = tokens = size = 0
    for text in texts:
        found = text.split()
        cut_words = tokenizer.encode_batch([" " + word for word in found])
        words, whole = words + len(found), whole + sum(len(ids) == 1 for ids in cut_words)
        pieces += sum(map(len, cut_words))
        tokens, size = tokens + len(tokenizer.encode(text)), size + len(text.encode())
    return {
        "tokens per word": pieces / max(1, words),
        "words kept whole": whole / max(1, words),
        "bytes per token": size / max(1, tokens),
    }


def _train_huggingface(texts: Iterator[str], type: str, vocab_size: int, names: list[str]) -> tuple[bytes, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": names,
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    trainer: Any = None
    if type == "bpe":
        tokenizer = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(**common)
    elif type == "wordpiece":
        # Without a prefix on continuations each byte is one id wherever it stands, and decoding loses nothing.
        tokenizer = Tokenizer(models.WordPiece(unk_token="<pad>", max_input_chars_per_word=2**31 - 1))
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="", **common)
    else:
        # The library's Unigram trainer sums in the order of a randomly seeded hash table: no two runs agree.
        counts = Counter(word for text in texts for word, _ in words.pre_tokenize_str(text))
        tokenizer = Tokenizer(models.Unigram(_learn_unigram(counts, alphabet, vocab_size, names)))
        tokenizer.add_special_tokens(names)
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    if trainer is not None:
        tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode(), tokenizer.get_vocab_size()


def _learn_unigram(
    counts: Counter[str], alphabet: list[str], vocab_size: int, names: list[str]
) -> list[tuple[str, float]]:
    """Pieces of byte-level words and their log-probabilities, the special tokens first, by SentencePiece's trainer."""
    # Counting every byte once puts all 256 into the vocabulary, so no text is out of reach.
    counts.update(alphabet)
    rows = (f"{word}\t{count}" for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    learned = _run_sentencepiece(
        rows,
        input_format="tsv",
        model_type="unigram",
        vocab_size=vocab_size - len(names) + 1,
        character_coverage=1.0,
        split_by_unicode_script=False,
        split_by_number=False,
        bos_id=-1,
        unk_id=0,
        eos_id=-1,
        pad_id=-1,
    )
    pieces = [(learned.id_to_piece(i), learned.get_score(i)) for i in range(1, learned.vocab_size())]
    # The scores of special tokens only keep the search for pieces from ever choosing them.
    return [(name, -1e4) for name in names] + pieces


def _train_sentencepiece(texts: Iterator[str], type: str, vocab_size: int, names: list[str]) -> tuple[bytes, int]:
    learned = _run_sentencepiece(
        (line for text in texts for line in text.split("\n") if line),
        model_type=type,
        vocab_size=vocab_size,
        byte_fallback=True,
        user_defined_symbols=["\n"],
        control_symbols=["<mask>", *names[len(SPECIALS) :]],
        bos_id=-1,
        unk_id=0,
        eos_id=1,
        pad_id=2,
        eos_piece=SPECIALS[0],
        pad_piece=SPECIALS[2],
    )
    return learned.serialized_model_proto(), int(learned.vocab_size())


def _run_sentencepiece(rows: Iterator[str], **options: Any) -> Any:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=rows,
            model_writer=model,
            hard_vocab_limit=False,
            # Every text must come back as it was.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(f"no --vocab-size {options['vocab_size']} can be learned from this text ({error}).") from error
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
