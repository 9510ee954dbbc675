"""What a pair holds: counts, lengths of documents, a picture of them, and the full check of every offset and digest."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from megapre.data.indexed import IndexedDataset
from megapre.data.sidecar import Sidecar, tree_digest

ROWS = 1 << 20


def document_lengths(dataset: IndexedDataset) -> np.ndarray:
    """Tokens of every document, int64 [documents]."""
    return np.diff(dataset.documents)


def summary(dataset: IndexedDataset) -> dict[str, object]:
    """Facts of a pair in the order to print them."""
    lengths = document_lengths(dataset)
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int).tolist() if len(lengths) else []
    record = dataset.sidecar.tokenizer if dataset.sidecar else None
    facts: dict[str, object] = {
        "documents": len(dataset),
        "sequences": dataset.sequences,
        "tokens": dataset.total_tokens,
        "dtype": dataset.dtype.name,
        "tokens per document": f"mean {lengths.mean():.1f}, least/10%/median/90%/most {quantiles}"
        if quantiles
        else "-",
        "empty documents": int((lengths == 0).sum()),
        "tokenizer": f"{record.type}, {record.vocab_size} ids, sha256 {str(record.digest)[:12]}"
        if record
        else "unknown",
        "end of document": f"{record.eod}, {'appended' if record.eod_appended else 'not appended'}"
        if record
        else "unknown",
        "validated": bool(dataset.sidecar and dataset.sidecar.validated == dataset.sidecar.idx_digest is not None),
    }
    return facts


def validate(prefix: str) -> dict[str, object]:
    """Check every offset, document, digest and id of a pair, and keep the result in its sidecar; ValueError on a flaw.

    A pair without a sidecar gets one, with its digests and without a tokenizer.
    """
    dataset = IndexedDataset(prefix, verify=True)
    record = dataset.sidecar.tokenizer if dataset.sidecar else None
    low, high, ends = 0, -1, 0
    for start in range(0, dataset.total_tokens, ROWS):
        tokens = dataset.read(start, min(start + ROWS, dataset.total_tokens))
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
        ends += int((tokens == record.eod).sum()) if record and record.eod is not None else 0
    if low < 0 or (record is not None and high >= record.vocab_size):
        limit = record.vocab_size if record else "any"
        raise ValueError(
            f"{prefix} holds token id {low if low < 0 else high}, outside the {limit} ids of its tokenizer."
        )
    if record is not None and record.eod_appended:
        last = np.asarray([dataset.read(end - 1, end)[0] for end in dataset.documents[1:] if end])
        if (last != record.eod).any():
            raise ValueError(
                f"{prefix}: document {int((last != record.eod).argmax())} does not end in id {record.eod}."
            )
    sidecar = dataset.sidecar or Sidecar(
        dataset.dtype.name, dataset.sequences, len(dataset), dataset.total_tokens, os.path.getsize(prefix + ".bin"),
        os.path.getsize(prefix + ".idx"), tree_digest(prefix + ".bin"), tree_digest(prefix + ".idx"),
    )  # fmt: skip
    if sidecar.idx_digest is None or sidecar.bin_digest is None:
        sidecar = replace(
            sidecar, bin_digest=tree_digest(prefix + ".bin"), idx_digest=tree_digest(prefix + ".idx")
        )  # fmt: skip
    replace(sidecar, validated=sidecar.idx_digest).write(prefix + ".json")
    return {
        "largest id": high,
        "end-of-document ids": ends,
        "digests": "as recorded" if dataset.sidecar else "recorded",
    }


def histogram(dataset: IndexedDataset, title: str) -> str:
    """An SVG of how many documents, and tokens, are in documents of 2^k to 2^(k+1) tokens."""
    lengths = document_lengths(dataset)
    lengths = lengths[lengths > 0]
    top = int(lengths.max()).bit_length() if len(lengths) else 1
    edges = 2 ** np.arange(top + 1)
    documents = np.histogram(lengths, edges)[0] / max(1, len(lengths))
    tokens = np.histogram(lengths, edges, weights=lengths)[0] / max(1, lengths.sum())
    width, height, step = 60 + 44 * top, 260, 44
    bars = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/><text x="10" y="18">{_plain(title)}: '
        f"share of documents (blue) and of tokens (orange) by length</text>"
    ]
    most = max(documents.max(), tokens.max())
    for k in range(top):
        for share, shift, colour in ((documents[k], 0, "#4878a8"), (tokens[k], 17, "#e08030")):
            tall = 190 * share / most
            bars.append(f'<rect x="{40 + k * step + shift}" y="{225 - tall:.1f}" width="15" height="{tall:.1f}" '
                        f'fill="{colour}"><title>{share:.4f}</title></rect>')  # fmt: skip
        bars.append(f'<text x="{42 + k * step}" y="242">{edges[k]}</text>')
    return "\n".join([*bars, "</svg>", ""])


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
