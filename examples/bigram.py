"""How good is a bigram model on the same tokens? python examples/bigram.py JOB.toml [key=value ...].

Fits the Witten-Bell bigram (IEEE Trans. IT 37(4), 1991) on exactly the tokens that the job consumes in
``train.steps`` steps, and prints its mean loss on the job's validation samples.
"""

import math
import sys

import numpy as np

from megapre.config.check import check
from megapre.config.load import load
from megapre.config.schema import Config
from megapre.data.check import check_data
from megapre.data.loader import Loader, validation


def pairs(microbatches: list) -> np.ndarray:
    """(token, next token) of every prediction that counts, [n, 2]."""
    rows = [np.stack((m.tokens.numpy()[m.weights > 0], m.targets.numpy()[m.weights > 0]), 1) for m in microbatches]
    return np.concatenate(rows)


def witten_bell(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Mean -log p of ``held_out`` pairs.

    p(b | a) = (c(ab) + T(a) p(b)) / (c(a) + T(a)) with T(a) the number of kinds that followed a, and
    p(b) = (c(b) + T / V) / (N + T) likewise from the unigram counts, T kinds seen of V.
    """
    unigram = np.bincount(train[:, 1], minlength=vocab_size).astype(float)
    kinds = float((unigram > 0).sum())
    p = (unigram + kinds / vocab_size) / (unigram.sum() + kinds)
    codes, counts = np.unique(train[:, 0] * vocab_size + train[:, 1], return_counts=True)
    first = codes // vocab_size
    total = np.bincount(first, weights=counts, minlength=vocab_size)
    followers = np.bincount(first, minlength=vocab_size).astype(float)
    wanted = held_out[:, 0] * vocab_size + held_out[:, 1]
    place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    seen = np.where(codes[place] == wanted, counts[place], 0)
    a, b = held_out[:, 0], held_out[:, 1]
    unseen_context = total[a] + followers[a] == 0
    mixed = (seen + followers[a] * p[b]) / np.where(unseen_context, 1, total[a] + followers[a])
    return float(-np.log(np.where(unseen_context, p[b], mixed)).mean())


def bigram_loss(config: Config) -> tuple[float, int]:
    """The bigram's validation loss and the number of tokens it was fitted on."""
    vocab_size = check_data(config)
    place = {"vocab_size": vocab_size, "data_rank": 0, "data_size": 1}
    loader = Loader(config, **place)
    train = np.concatenate([pairs(loader.step_batch(step).microbatches) for step in range(config.train.steps)])
    return witten_bell(train, pairs(validation(config, **place)), vocab_size), len(train)


if __name__ == "__main__":
    job = check(load(sys.argv[1], sys.argv[2:]))
    loss, tokens = bigram_loss(job)
    print(f"Witten-Bell bigram fitted on the {tokens} tokens of {job.train.steps} steps: ", end="")
    print(f"validation loss {loss:.4f}, perplexity {math.exp(loss):.1f}")
