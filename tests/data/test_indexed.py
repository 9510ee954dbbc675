from __future__ import annotations

import gc
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from megapre.data.indexed import HEADER, MAGIC, IndexedDataset, IndexedWriter, token_dtype
from megapre.data.sidecar import TokenizerRecord

# Three documents; the second is two sequences.
DOCUMENTS = [[[5, 6, 7]], [[8, 9], [10]], [[11, 12, 13, 14]]]


def expected_bytes(code: int, letter: str) -> tuple[bytes, bytes]:
    """The pair of DOCUMENTS, packed field by field from the format's table."""
    size = struct.calcsize("<" + letter)
    sequences = [sequence for document in DOCUMENTS for sequence in document]
    tokens = [token for sequence in sequences for token in sequence]
    idx = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    idx += struct.pack("<Q", 4) + struct.pack("<Q", 4)
    idx += struct.pack("<4i", 3, 2, 1, 4)
    idx += struct.pack("<4q", 0, 3 * size, 5 * size, 6 * size)
    idx += struct.pack("<4q", 0, 1, 3, 4)
    return struct.pack(f"<{len(tokens)}{letter}", *tokens), idx


def write_bytes(prefix: Path, bin_bytes: bytes, idx_bytes: bytes) -> str:
    Path(f"{prefix}.bin").write_bytes(bin_bytes)
    Path(f"{prefix}.idx").write_bytes(idx_bytes)
    return str(prefix)


def write_documents(prefix: Path, dtype: str = "<u2", tokenizer: TokenizerRecord | None = None) -> str:
    with IndexedWriter(str(prefix), dtype, tokenizer) as writer:
        for document in DOCUMENTS:
            flat = [token for sequence in document for token in sequence]
            writer.add_document(flat, [len(sequence) for sequence in document])
    return str(prefix)


FORMATS = [(8, "H", "<u2"), (4, "i", "<i4"), (1, "B", "<u1"), (5, "q", "<i8")]


@pytest.mark.parametrize("code, letter, dtype", FORMATS)
def test_writer_makes_the_bytes_of_the_format(tmp_path, code, letter, dtype):
    write_documents(tmp_path / "x", dtype)
    bin_bytes, idx_bytes = expected_bytes(code, letter)
    assert (tmp_path / "x.bin").read_bytes() == bin_bytes
    assert (tmp_path / "x.idx").read_bytes() == idx_bytes
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx", "x.json"]


@pytest.mark.parametrize("code, letter, dtype", FORMATS)
def test_reader_understands_the_bytes_of_the_format(tmp_path, code, letter, dtype):
    prefix = write_bytes(tmp_path / "x", *expected_bytes(code, letter))
    with pytest.warns(UserWarning, match=r"x\.json is missing"):
        data = IndexedDataset(prefix)
    assert data.dtype == np.dtype(dtype)
    assert data.total_tokens == 10 and len(data) == 3 and data.sequences == 4
    assert data.documents.tolist() == [0, 3, 6, 10] and data.documents.dtype == np.int64
    assert data.tokens.tolist() == list(range(5, 15))
    assert data.document(1).tolist() == [8, 9, 10]
    assert data.read(2, 7).tolist() == [7, 8, 9, 10, 11]
    assert data.document_starts(0, 7).tolist() == [0, 3, 6]
    assert data.document_starts(1, 6).tolist() == [3]
    assert data.document_starts(7, 10).tolist() == []


def test_dtype_follows_the_header_between_65500_and_65536(tmp_path):
    """The peer guesses the type again when it reads: [100, 200, 65529, 7] came back as [100, 0, 200, 0]."""
    assert token_dtype(65499) == np.dtype("<u2") and token_dtype(65500) == np.dtype("<i4")
    assert token_dtype(None) == np.dtype("<i4")
    for dtype in ("<u2", "<i4"):
        prefix = str(tmp_path / dtype.strip("<"))
        with IndexedWriter(prefix, dtype) as writer:
            writer.add_document([100, 200, 65529, 7])
        assert IndexedDataset(prefix).document(0).tolist() == [100, 200, 65529, 7]


def test_ids_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    for ids in ([65536], [-1], [1.5]):
        with pytest.raises(ValueError, match=r"fit|integers"), IndexedWriter(str(tmp_path / "x"), "<u2") as writer:
            writer.add_document([1, 2])
            writer.add_document(ids)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 7, 19])
def test_cut_bin_is_refused(tmp_path, cut):
    prefix = write_documents(tmp_path / "x")
    os.truncate(prefix + ".bin", 20 - cut)
    with pytest.raises(ValueError, match=rf"x\.bin has {20 - cut} bytes .* 20 "):
        IndexedDataset(prefix)


def test_a_bin_that_grew_is_refused(tmp_path):
    prefix = write_documents(tmp_path / "x")
    with open(prefix + ".bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match="has 22 bytes"):
        IndexedDataset(prefix)


def test_every_cut_and_every_flipped_byte_of_the_index_is_seen(tmp_path):
    """No index byte can change without an error: the header, lengths, pointers and documents check each other.

    Document bounds move within what is consistent, so there the digest has to see it.
    """
    prefix = write_documents(tmp_path / "x")
    whole = Path(prefix + ".idx").read_bytes()
    for size in range(len(whole)):
        Path(prefix + ".idx").write_bytes(whole[:size])
        with pytest.raises(ValueError):
            IndexedDataset(prefix)
    for at in range(len(whole)):
        for bit in (1, 128):
            Path(prefix + ".idx").write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(ValueError):
                IndexedDataset(prefix, verify=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b"NOTANIDX\0" + b[9:], "does not begin"),
        (lambda b: b[:9] + struct.pack("<Q", 2) + b[17:], "version 2"),
        (lambda b: b[:17] + b"\x07" + b[18:], "dtype code 7"),
        (lambda b: b[:18] + struct.pack("<Q", 2**63) + b[26:], "take "),
        (lambda b: b + b"\0" * 4, "multimodal"),
        (lambda b: b[:54] + struct.pack("<q", 8) + b[62:], "sequence 1 is at byte 8 where .* 6|sequence 0 is at byte"),
        (lambda b: b[:34] + struct.pack("<i", -3) + b[38:], "-3 tokens"),
        (lambda b: b[:82] + struct.pack("<4q", 0, 3, 1, 4), "backwards"),
        (lambda b: b[:82] + struct.pack("<4q", 1, 1, 3, 4), "from sequence 1"),
    ],
)
def test_an_inconsistent_index_is_refused_in_one_sentence(tmp_path, change, message):
    prefix = write_bytes(tmp_path / "x", *expected_bytes(8, "H"))
    Path(prefix + ".idx").write_bytes(change(Path(prefix + ".idx").read_bytes()))
    with pytest.warns(UserWarning) if "byte" in message or "back" in message or "-3" in message else _nothing():
        with pytest.raises(ValueError, match=message) as caught:
            IndexedDataset(prefix, verify=True)
    assert "\n" not in str(caught.value)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.bin does not exist; data\.paths"):
        IndexedDataset(str(tmp_path / "nowhere"))


def test_reads_outside_the_stream_are_refused(tmp_path):
    """The peer returns the rest of the file for a length of -1."""
    data = IndexedDataset(write_documents(tmp_path / "x"))
    for start, stop in ((-1, 3), (3, 2), (0, 11), (11, 11)):
        with pytest.raises(ValueError, match="outside the 10 tokens"):
            data.read(start, stop)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            data.document(index)
    assert data.read(10, 10).tolist() == []


def test_arrays_outlive_their_dataset(tmp_path):
    data = IndexedDataset(write_documents(tmp_path / "x"))
    tokens, document, bounds = data.tokens, data.document(2), data.documents
    del data
    gc.collect()
    assert tokens.tolist() == list(range(5, 15))
    assert document.tolist() == [11, 12, 13, 14] and bounds.tolist() == [0, 3, 6, 10]


def test_a_bin_cut_while_open_raises(tmp_path):
    data = IndexedDataset(write_documents(tmp_path / "x"))
    os.truncate(data.prefix + ".bin", 8)
    with pytest.raises(ValueError, match="12 bytes early"):
        data.read(0, 10)


def test_empty_documents_and_an_empty_pair(tmp_path):
    with IndexedWriter(str(tmp_path / "x"), "<u2") as writer:
        for ids in ([], [1, 2], [], [], [3], []):
            writer.add_document(ids)
    data = IndexedDataset(str(tmp_path / "x"))
    assert data.documents.tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert np.unique(data.document_starts(0, 3)).tolist() == [0, 2]
    with IndexedWriter(str(tmp_path / "y"), "<u2"):
        pass
    empty = IndexedDataset(str(tmp_path / "y"))
    assert empty.total_tokens == 0 and len(empty) == 0 and empty.tokens.size == 0


def test_trailing_documents_without_sequences(tmp_path):
    """Megatron's builder may end a document twice: both bounds are the number of sequences."""
    idx = HEADER.pack(MAGIC, 1, 8, 1, 3) + struct.pack("<i", 2) + struct.pack("<q", 0) + struct.pack("<3q", 0, 1, 1)
    prefix = write_bytes(tmp_path / "x", struct.pack("<2H", 1, 2), idx)
    with pytest.warns(UserWarning):
        data = IndexedDataset(prefix)
    assert data.documents.tolist() == [0, 2, 2] and data.document(1).tolist() == []


def test_bulk_and_single_writing_agree(tmp_path):
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 9, 200)
    flat = rng.integers(0, 60000, lengths.sum())
    with IndexedWriter(str(tmp_path / "a"), "<u2") as writer:
        for start, length in zip(np.cumsum(lengths) - lengths, lengths):
            writer.add_document(flat[start : start + length])
    with IndexedWriter(str(tmp_path / "b"), "<u2") as writer:
        writer.add_documents(flat[: lengths[:50].sum()], lengths[:50])
        writer.add_documents(flat[lengths[:50].sum() :], lengths[50:])
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_sidecar_sees_another_file_and_digests_see_a_flipped_bit(tmp_path):
    record = TokenizerRecord("ByteTokenizer", "ab" * 32, 257, 256)
    prefix = write_documents(tmp_path / "x", tokenizer=record)
    assert IndexedDataset(prefix, verify=True).sidecar.tokenizer == record
    data = bytearray(Path(prefix + ".bin").read_bytes())
    data[4] ^= 1
    Path(prefix + ".bin").write_bytes(data)
    IndexedDataset(prefix)
    with pytest.raises(ValueError, match=r"x\.bin has digest .* damaged"):
        IndexedDataset(prefix, verify=True)
    content = json.loads(Path(prefix + ".json").read_text())
    Path(prefix + ".json").write_text(json.dumps({**content, "tokens": 11}))
    with pytest.raises(ValueError, match="records tokens = 11 where the pair has 10"):
        IndexedDataset(prefix)
    for broken in ("{", "[]", '{"dtype": "uint16"}', json.dumps({**content, "tokens": "10"})):
        Path(prefix + ".json").write_text(broken)
        with pytest.raises(ValueError, match=r"x\.json"):
            IndexedDataset(prefix)


def test_rewriting_a_pair_replaces_all_of_it(tmp_path):
    """B75: nothing of the old pair may be read with the new one."""
    prefix = write_documents(tmp_path / "x")
    with IndexedWriter(prefix, "<i4") as writer:
        writer.add_document([70000, 1])
        assert IndexedDataset(prefix).document(0).tolist() == [5, 6, 7]
    assert IndexedDataset(prefix, verify=True).document(0).tolist() == [70000, 1]


def test_positions_beyond_32_bits(tmp_path):
    """B56: sparse 8.4 GB of tokens; every count, offset and pointer against Python's integers."""
    prefix, length, count = str(tmp_path / "x"), 2**31 - 1, 2
    try:
        with open(prefix + ".bin", "wb") as file:
            file.truncate(2 * length * count)
            file.seek(2 * (length + 5))
            file.write(struct.pack("<H", 4242))
    except OSError:
        pytest.skip("this file system has no large sparse files")
    idx = HEADER.pack(MAGIC, 1, 8, count, count + 1) + struct.pack("<2i", length, length)
    Path(prefix + ".idx").write_bytes(idx + struct.pack("<2q", 0, 2 * length) + struct.pack("<3q", 0, 1, 2))
    with pytest.warns(UserWarning):
        data = IndexedDataset(prefix)
    assert data.total_tokens == 2 * length and data.documents.tolist() == [0, length, 2 * length]
    assert data.read(length + 4, length + 7).tolist() == [0, 4242, 0]
    assert data.document_starts(length - 1, length + 1).tolist() == [length]
    assert int(data.tokens[length + 5]) == 4242


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.filterwarnings("ignore")
def test_megatron_reads_ours_and_ours_reads_megatrons(tmp_path, monkeypatch, dtype):
    """With the real builder: a plain import, or the folder in MEGATRON_CORE_PATH."""
    if "MEGATRON_CORE_PATH" in os.environ:
        monkeypatch.setattr(sys, "path", [os.environ["MEGATRON_CORE_PATH"], *sys.path])
    peer = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = peer.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = write_documents(tmp_path / "ours", np.dtype(dtype).newbyteorder("<").str)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()
    assert IndexedDataset(str(tmp_path / "theirs")).tokens.tolist() == list(range(5, 15))
    theirs = peer.IndexedDataset(ours)
    assert [theirs[i].tolist() for i in range(4)] == [s for document in DOCUMENTS for s in document]
    assert theirs.document_indices.tolist() == [0, 1, 3, 4]
