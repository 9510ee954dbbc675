"""An objective of sentences learns what can be told: the order of texts that count their own sentences.

Loss and gradients agree with an oracle elsewhere; whether label and text belong together, only learning shows.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megapre.config.check import check
from megapre.config.load import load
from megapre.data.indexed import IndexedWriter
from megapre.data.pack import plan
from megapre.data.sidecar import TokenizerRecord
from megapre.resilience.ranks import ALONE
from tests.data.test_objective_data import SPECIALS, SPLIT, VOCAB
from tests.training.jobs import losses, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "objectives"
FIRST, SENTENCES, WORDS = 10, 6, 4
SEQUENCE = 32


def counted(prefix: Path, documents: int = 200) -> str:
    """Documents of six sentences, of which each begins with its number; the other words say nothing."""
    rng = np.random.default_rng(3)
    tokenizer = TokenizerRecord("NullTokenizer", "0" * 64, VOCAB, 7, mask=399, specials=SPECIALS)
    with IndexedWriter(str(prefix), "<u2", tokenizer) as writer:
        for _ in range(documents):
            ids = rng.integers(100, 300, (SENTENCES, WORDS))
            ids[:, 0] = FIRST + np.arange(SENTENCES)
            writer.add_document(ids.ravel(), [WORDS] * SENTENCES)
    plan(str(prefix), SEQUENCE, SPLIT, sentences=True)
    return str(prefix)


def test_the_order_of_counted_sentences_is_learnt(tmp_path: Path) -> None:
    steps = 60
    changes = [
        f'data.paths=["{counted(tmp_path / "text")}"]', f"data.split={SPLIT}", "data.tokenizer_model=",
        "data.tokenizer_type=NullTokenizer", f"model.sequence={SEQUENCE}", f"model.vocab_size={VOCAB}",
        "model.hidden=32", "parallel.data=1", f"train.steps={steps}", "train.global_batch=16", "train.microbatch=16",
        "schedule.warmup=10", "train.eval_samples=64", f"train.run_dir={tmp_path / 'run'}", "train.threads=1",
        "train.device=cpu", "checkpoint.resume=false",
    ]  # fmt: skip
    assert run(ALONE, check(load(EXAMPLES / "sentence_order.toml", changes))) == 0
    found = losses(tmp_path / "run", "validation", "loss/sentences")
    assert float.fromhex(found[steps]) < 0.1 * math.log(2)
