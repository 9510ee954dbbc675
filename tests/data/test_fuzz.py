"""Hypothesis against every parser: hostile input is counted or refused, never a crash, a foreign token or a loss.

2,000 cases in `make test`; the nightly lane sets MEGAPRE_FUZZ to run 100,000.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import lzma
import os
import struct
import subprocess
import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import orjson
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings

from megapre.data import native
from megapre.data.indexed import HEADER, MAGIC, IndexedDataset
from megapre.data.marks import mark, mark_reference
from megapre.data.order import permute_reference, short_block_slot, two_level_reference
from megapre.data.sidecar import read_sidecar
from megapre.tokenizers import documents
from megapre.tokenizers.backends import choose
from megapre.tokenizers.documents import batches, parse
from megapre.tokenizers.inputs import Span, frames_complete
from megapre.tokenizers.load import load
from megapre.tokenizers.train import train

CASES = int(os.environ.get("MEGAPRE_FUZZ", "2000"))
TESTS = 9


def fuzz(share: float = 1.0):
    """Settings for this test's share of the cases."""
    return settings(
        max_examples=max(1, int(CASES * share / TESTS)), deadline=None, derandomize=CASES == 2000, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "id", "meta"]) | TEXT, inner),
    max_leaves=6,
)
OBJECT = st.dictionaries(st.sampled_from(["text", "id", "url"]), TEXT | JSON, max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")
)
LINE = st.one_of(
    OBJECT, st.binary(max_size=40), JSON.map(lambda v: json.dumps(v).encode()), st.just(b""), st.just(b" ")
)


def judge(line: bytes) -> str | None:
    """The text that a line holds by the standard library, or None when it is no document."""
    seen: list[list[tuple[str, object]]] = []
    try:
        orjson.loads(line)  # one JSON value, as RFC 8259 has it
        pairs = json.loads(line, object_pairs_hook=lambda found: seen.append(found) or dict(found))
        keys = [key for key, _ in seen[-1]] if isinstance(pairs, dict) else []
        text = pairs["text"] if keys.count("text") == 1 or line.count(b'"text"') == 1 else None
        text.encode()
        return text if isinstance(text, str) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


@fuzz()
@given(st.lists(LINE, max_size=6))
def test_lines_are_documents_or_counted(lines):
    lines = [line.replace(b"\n", b"") for line in lines]
    batch = parse(lines, 1, ["text"])
    wanted = [(i, judge(line)) for i, line in enumerate(lines, 1) if line.strip(b" \t\r\x0b\x0c")]
    assert list(zip(batch.lines, [texts[0] for texts in batch.texts])) == [(i, t) for i, t in wanted if t is not None]
    assert [line for line, _ in batch.bad] == [i for i, text in wanted if text is None]


@fuzz()
@given(st.lists(LINE, max_size=8), st.integers(1, 50), st.lists(st.integers(0, 400), max_size=4), st.booleans())
def test_cuts_blocks_and_limits_lose_no_line(tmp_path_factory, lines, block, cuts, end):
    lines = [line.replace(b"\n", b"") for line in lines]
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * end)
    size, limit = path.stat().st_size, 60
    bounds = sorted({0, size, *(cut for cut in cuts if cut <= size)})
    old, documents.BLOCK = documents.BLOCK, block
    try:
        spans = [Span(str(path), start, stop, False) for start, stop in itertools.pairwise(bounds)]
        found = [batch for span in spans for batch in batches(span, ["text"], limit)]
    finally:
        documents.BLOCK = old
    content = [line for line in lines]
    if content:
        content[0] = content[0].removeprefix(documents.BOM) if len(content[0]) <= limit else content[0]
    whole = parse([None if len(line) > limit else line for line in content], 1, ["text"], limit)
    assert [texts for b in found for texts in b.texts] == whole.texts
    assert sum(len(b.bad) for b in found) == len(whole.bad)


@fuzz()
@given(
    st.lists(OBJECT | JSON.map(lambda v: json.dumps(v).encode()), max_size=5),
    st.binary(max_size=6),
    st.integers(0, 300),
)
def test_arrays_give_their_values_up_to_the_flaw(tmp_path_factory, values, junk, at):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    content = b"[" + b", ".join(values) + b"]"
    path.write_bytes(content)
    found = [t for b in batches(Span(str(path), 0, len(content), True), ["text"]) for t in b.texts]
    if all(_utf8(value) for value in values):
        assert found == [t for t in parse(values, 1, ["text"]).texts]
    path.write_bytes(content[:at] + junk + content[at:])
    for batch in batches(Span(str(path), 0, len(content), True), ["text"]):
        assert all(isinstance(text, str) for texts in batch.texts for text in texts)


def _utf8(value: bytes) -> bool:
    try:
        value.decode()
        return True
    except UnicodeDecodeError:
        return False


@fuzz()
@given(st.lists(st.text(max_size=60), min_size=1, max_size=12), st.sampled_from([".gz", ".zst", ".xz"]),
       st.integers(0, 10**6), st.binary(max_size=3), st.booleans())  # fmt: skip
def test_cut_or_flipped_packing_loses_nothing_silently(tmp_path_factory, texts, pack, at, junk, cut):
    make = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress, ".xz": lzma.compress}
    whole = make[pack](b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    at %= len(whole)
    broken = whole[:at] if cut else whole[:at] + junk + whole[at + len(junk) :]
    path = tmp_path_factory.getbasetemp() / f"fuzz.jsonl{pack}"
    path.write_bytes(broken)
    found = list(batches(Span(str(path), 0, len(broken), True), ["text"]))
    good, bad = [t[0] for b in found for t in b.texts], [reason for b in found for _, reason in b.bad]
    # gzip's header has bytes (name, time, system) that carry no content: all texts are then still there.
    assert good == texts if not bad and broken else good == texts[: len(good)] or bad
    assert bad or good == texts or not broken


@fuzz()
@given(st.binary(max_size=80), st.integers(0, 5), st.integers(0, 120), st.binary(max_size=8))
def test_zstandard_walk_ends(tmp_path_factory, data, frames, at, junk):
    path = tmp_path_factory.getbasetemp() / "fuzz.zst"
    whole = b"".join(zstandard.compress(data * (i + 1)) for i in range(frames))
    path.write_bytes(whole)
    assert frames_complete(str(path))
    path.write_bytes(whole[:at] + junk)
    frames_complete(str(path))


NUMBER = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**40]))


@fuzz()
@given(st.lists(st.integers(-2, 9), max_size=6), st.lists(NUMBER, max_size=6), st.lists(NUMBER, min_size=1, max_size=6),
       st.tuples(st.integers(1, 3), st.integers(0, 9), NUMBER, NUMBER), st.booleans(), st.integers(0, 40))  # fmt: skip
def test_a_hostile_index_is_refused_or_read_within_the_file(
    tmp_path_factory, lengths, pointers, first, head, honest, size
):
    """Whatever the index says, no read leaves the file, no array is made for a count that the size denies."""
    prefix = tmp_path_factory.getbasetemp() / "fuzz"
    lengths = [max(-(2**31), min(n, 2**31 - 1)) for n in lengths]
    pointers = (pointers + [0] * 6)[: len(lengths)]
    version, code, s, d = (1, 8, len(lengths), len(first)) if honest else (head[0], head[1], abs(head[2]), abs(head[3]))
    idx = HEADER.pack(MAGIC, version, code, s % 2**64, d % 2**64)
    idx += struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(first)}q", *lengths, *pointers, *first)
    Path(f"{prefix}.idx").write_bytes(idx)
    Path(f"{prefix}.bin").write_bytes(bytes(range(size)))
    Path(f"{prefix}.json").unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = IndexedDataset(str(prefix))
        except ValueError as error:
            assert "\n" not in str(error)
            return
        for read in (
            lambda: [data.document(i) for i in range(min(len(data), 8))], lambda: data.document_starts(0, 5),
            lambda: data.document_starts(3, data.total_tokens), lambda: data.documents,
            lambda: data.read(0, data.total_tokens),
        ):  # fmt: skip
            try:
                found = read()
                arrays = found if isinstance(found, list) else [found]
                assert sum(map(len, arrays)) <= max(data.total_tokens, len(data) + 1) * 8
            except ValueError as error:
                assert "\n" not in str(error)


FIELDS = ["dtype", "sequences", "documents", "tokens", "bin_bytes", "idx_bytes", "bin_digest", "tokenizer", "packs"]


@fuzz()
@given(st.dictionaries(st.sampled_from(FIELDS), JSON) | JSON)
def test_a_sidecar_is_understood_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz_sidecar.json"
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    try:
        read_sidecar(path)
    except ValueError as error:
        assert str(path) in str(error)


MADE = (
    ("HuggingFaceTokenizer", "bpe", "tokenizers"), ("HuggingFaceTokenizer", "wordpiece", "tokenizers"),
    ("HuggingFaceTokenizer", "unigram", "tokenizers"), ("SentencePieceTokenizer", "bpe", "sentencepiece"),
    ("TikTokenizer", "", ""), ("GPT2BPETokenizer", "", ""), ("BertWordPieceCase", "", ""),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """Type and content of one small file of each kind."""
    folder, made = tmp_path_factory.mktemp("files"), []
    (folder / "text.txt").write_text("the cat sat on the mat, lower and lowest of all the rest\n" * 40)
    for number, (kind, type, backend) in enumerate(MADE[:4]):
        path = folder / str(number)
        train([str(folder / "text.txt")], str(path), type=type, backend=backend, vocab_size=300)
        made.append((kind, path.read_bytes()))
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks)]
    model = json.loads(made[0][1])["model"]
    vocab = json.dumps(model["vocab"]).encode()
    return [*made, ("TikTokenizer", b"\n".join(lines)), ("GPT2BPETokenizer", vocab),
            ("BertWordPieceCase", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s\n")]  # fmt: skip


EDIT = st.tuples(
    st.sampled_from(["set", "drop", "add", "cut", "node"]), st.integers(0, 10**6), st.binary(max_size=6), JSON
)


def edited(content: bytes, edits: list[tuple[str, int, bytes, object]]) -> bytes:
    """Bytes changed, removed, added or cut off, or a node of the JSON tree replaced."""
    for how, at, junk, value in edits:
        at %= len(content) + 1
        if how == "node":
            try:
                content = json.dumps(_with_node(json.loads(content), at, value)).encode()
                continue
            except (ValueError, RecursionError):
                how = "set"
        rest = {"set": content[at + len(junk) :], "drop": content[at + 9 :], "add": content[at:], "cut": b""}[how]
        content = content[:at] + (b"" if how == "drop" else junk) + rest
    return content


def _with_node(tree: object, at: int, value: object) -> object:
    if not isinstance(tree, dict | list) or not tree or at % 7 == 6:
        return value
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[at % len(keys)]
    tree[key] = _with_node(tree[key], at // 7, value)
    return tree


@fuzz()
@given(st.integers(0, len(MADE) - 1), st.lists(EDIT, min_size=1, max_size=3), st.text(max_size=30))
def test_a_tokenizer_file_is_refused_or_gives_ids_of_its_vocabulary(tmp_path_factory, tokenizer_files, which, edits,
                                                                    text):  # fmt: skip
    """And every back end that `auto` may take of it gives the same ids."""
    kind, content = tokenizer_files[which]
    path = tmp_path_factory.getbasetemp() / "fuzz_tokenizer"
    path.write_bytes(edited(content, edits))
    model = str(path)
    if kind == "GPT2BPETokenizer":
        merges = path.with_suffix(".merges")
        merges.write_bytes(b"#version: 0.2\nt h\n")
        model = f"{path}{os.pathsep}{merges}"
    try:
        tokenizer = load(kind, model)
        ids = tokenizer.encode(text)
        assert 0 <= tokenizer.eod < tokenizer.vocab_size and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(ids), str)
        _, encode = choose("auto", tokenizer, model, [text], lambda line: None)
        assert [int(i) for i in encode([text])[0]] == list(ids)
    except ValueError as error:
        assert "\n" not in str(error)


@fuzz()
@given(st.text(max_size=200))
def test_bytes_come_back_and_the_permutation_is_one(text):
    """B63: text -> ids -> text, with no escape added on the way; and C++ follows its definition."""
    tokenizer = load("ByteTokenizer")
    (line,) = parse([orjson.dumps({"text": text})], 1, ["text"]).texts
    assert tokenizer.decode(tokenizer.encode(line[0])) == text
    size, key = 1 + sum(map(ord, text)), hash(text) % 2**64
    found = native.library()
    if found is not None:
        index = size // 2
        assert found.megapre_permute(index, size, key) == permute_reference(index, size, key)
        slot = short_block_slot(size, key, 16)
        for group in (16, 64, 2**16):
            wanted = two_level_reference(index, size, key, slot, 16, group)
            assert found.megapre_two_level(index, size, key, slot, 16, group) == wanted
        starts = np.sort(np.asarray([ord(letter) % 50 for letter in text], np.int64))
        for mine, right in zip(mark(starts, 40), mark_reference(starts, 40), strict=True):
            assert mine.tolist() == right.tolist()


@pytest.mark.nightly
def test_a_hundred_thousand_cases():
    """The tests above in a process of their own, each from a random start."""
    command = ["-m", "pytest", "-q", "-x", str(Path(__file__)), "-m", "not nightly"]
    import sys

    environment = {**os.environ, "MEGAPRE_FUZZ": "100000"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.nightly
def test_helpers_under_address_sanitizer(tmp_path):
    """csrc/data compiled with ASan and UBSan, called with hostile records and odd sizes by a program of its own."""
    root = Path(__file__).parents[2]
    program = tmp_path / "fuzz.cpp"
    program.write_text(ASAN)
    command = [
        "g++",
        "-std=c++17",
        "-g",
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        str(program),
    ]
    subprocess.run(
        [*command, *map(str, sorted((root / "csrc" / "data").glob("*.cpp"))), "-o", str(tmp_path / "fuzz")], check=True
    )
    done = subprocess.run([str(tmp_path / "fuzz")], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "100000 cases" in done.stdout, done.stderr[-3000:]


ASAN = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
extern "C" {
int megapre_chairman(const int64_t*, int64_t, int64_t, int32_t*, int32_t*);
uint64_t megapre_permute(uint64_t, uint64_t, uint64_t);
uint64_t megapre_two_level(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
void megapre_mark_documents(const int64_t*, int64_t, int64_t, int64_t*, int64_t*);
int64_t megapre_document_starts(const unsigned char*, const unsigned char*, int64_t, int64_t, int64_t, int64_t, int64_t,
                                int64_t, int64_t*, int64_t);
}
int main() {
  std::mt19937_64 rng(7);
  const int64_t wild[] = {0, 1, 2, 5, 8, -1, -8, INT64_MAX, INT64_MIN, int64_t(1) << 40};
  for (int round = 0; round < 100000; ++round) {
    const int64_t k = 2 + rng() % 5;
    std::vector<int64_t> counts(k);
    int64_t period = 0;
    for (auto& c : counts) period += c = 1 + rng() % 20;
    std::vector<int32_t> source(period), rank(period);
    if (megapre_chairman(counts.data(), k, period, source.data(), rank.data())) return 1;
    const uint64_t size = 1 + rng() % (uint64_t(1) << (rng() % 50)), key = rng();
    if (megapre_permute(rng() % size, size, key) >= size) return 2;
    const uint64_t block = 1 + rng() % 17, blocks = (size + block - 1) / block;
    if (megapre_two_level(rng() % size, size, key, rng() % blocks, block, block * (1 + rng() % 9)) >= blocks * block)
      return 4;
    const int64_t length = rng() % 30;
    std::vector<int64_t> starts(rng() % 6), positions(length), segments(length);
    for (auto& at : starts) at = rng() % 4 ? int64_t(rng() % 40) - 3 : wild[rng() % 10];
    megapre_mark_documents(starts.data(), starts.size(), length, positions.data(), segments.data());
    for (int64_t i = 0; i < length; ++i)
      if (positions[i] < 0 || positions[i] > i || segments[i] < 0 || segments[i] > i) return 5;
    const int64_t documents = rng() % 9, sequences = rng() % 9, item = 1 << (rng() % 4), total = rng() % 40;
    // Exactly as large as they say, at an odd address, so that one byte too far is seen.
    unsigned char* first = (unsigned char*)malloc(8 * (documents + 1) + 1);
    unsigned char* pointers = (unsigned char*)malloc(8 * sequences + 1);
    for (int64_t i = 0; i <= documents; ++i) {
      int64_t v = rng() % 3 ? int64_t(rng() % (sequences + 1)) : wild[rng() % 10];
      memcpy(first + 1 + 8 * i, &v, 8);
    }
    for (int64_t i = 0; i < sequences; ++i) {
      int64_t v = rng() % 3 ? int64_t(rng() % (total * item + 1)) : wild[rng() % 10];
      memcpy(pointers + 1 + 8 * i, &v, 8);
    }
    std::vector<int64_t> out(1 + rng() % 4);
    const int64_t start = rng() % (total + 1), stop = start + rng() % (total + 2 - start);
    const int64_t found = megapre_document_starts(first + 1, pointers + 1, documents, sequences, item, total, start,
                                                  stop, out.data(), out.size());
    for (int64_t i = 0; i < found; ++i)
      if (out[i] < start || out[i] >= stop || (i && out[i] < out[i - 1])) return 3;
    free(first);
    free(pointers);
  }
  puts("100000 cases");
}
"""
