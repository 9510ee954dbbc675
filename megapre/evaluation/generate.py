"""Text from a checkpoint of any layout, on one rank, through the same layers that trained, with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megapre.checkpoint import store
from megapre.config.load import from_dict
from megapre.config.schema import Config, ParallelConfig
from megapre.data.loader import Microbatch
from megapre.models.context import KVCache
from megapre.parallel.grid import single
from megapre.tokenizers.load import load as load_tokenizer
from megapre.training.engine import Engine, build
from megapre.training.resume import restore


def open_checkpoint(path: Path) -> tuple[Config, Engine]:
    """The checkpoint's job and its engine, on this process alone."""
    state = store.read_state(path)
    config = replace(from_dict(state["job"]), parallel=ParallelConfig(data=1))
    engine = build(config, single(), torch.device("cpu"), state["vocab_size"])
    restore(path, config, engine.step)
    return config, engine


def resolve(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, else the newest valid one of a run folder."""
    if (path / "checkpoint.json").exists():
        return path
    problems: list[str] = []
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = store.newest_valid(root, log=problems.append)
    if newest is None:
        raise ValueError(f"{path} holds no valid checkpoint: give a step_N folder or a run folder.")
    return newest


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw from ``logits`` [vocabulary]: the largest at temperature 0, else softmax after top-k and top-p cuts."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = torch.sort(logits.float() / temperature, descending=True, stable=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probabilities = values.softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < top_p)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def continuation(
    config: Config,
    engine: Engine,
    prompt: list[int],
    tokens: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[int]:
    """Up to ``tokens`` ids that follow ``prompt``, which with them must fit ``model.sequence``."""
    limit = config.model.sequence
    if not 0 < len(prompt) or len(prompt) + tokens > limit:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and --tokens {tokens} do not fit model.sequence = {limit}: "
            f"shorten one of them (a prompt needs at least one token)."
        )
    generator = torch.Generator().manual_seed(seed)
    cache = KVCache()
    feed = prompt
    for _ in range(tokens):
        logits = _forward(engine, feed, cache, config.data.objective == "prefix")[: engine.model.vocab_size]
        cache.length += len(feed)
        feed = [sample(logits, temperature, top_k, top_p, generator)]
        yield feed[0]


def _forward(engine: Engine, ids: list[int], cache: KVCache, prefix: bool) -> Tensor:
    """Logits after the last of ``ids``, which follow what ``cache`` holds; with ``prefix`` the first see each other."""
    column = torch.tensor(ids).unsqueeze(1)
    microbatch = Microbatch(
        tokens=column,
        targets=column,
        weights=torch.zeros(column.shape),
        positions=torch.arange(cache.length, cache.length + len(ids)).unsqueeze(1),
        segments=None,
        samples=torch.zeros(1, dtype=torch.int64),
        # A prefix LM reads its prompt both ways; what it adds, from left to right.
        prefix=torch.tensor([len(ids)]) if prefix and not cache.length else None,
    )
    context = engine.model.context(microbatch, seed=0, step=0, training=False)
    context.cache = cache
    carry: tuple[Tensor, ...] = ()
    for layer in engine.model.layers:
        carry = layer(context, *carry)
    return carry[0][-1, 0]


def main(
    checkpoint: str,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    tokenizer: str = "",
) -> int:
    """Print ``prompt`` and what the model adds to it."""
    config, engine = open_checkpoint(resolve(Path(checkpoint)))
    if config.model.architecture != "decoder":
        raise ValueError(f"model.architecture = {config.model.architecture!r} cannot generate: only a decoder can.")
    model_file = tokenizer or config.data.tokenizer_model
    coder = load_tokenizer(config.data.tokenizer_type, model_file, engine.model.vocab_size - 1)  # eod is one more
    ids = coder.encode(prompt) or [coder.eod]
    started = time.monotonic()
    room = max(1, config.model.sequence - len(ids))  # a prompt that is too long is refused below
    new = []
    for token in continuation(
        config, engine, ids, min(tokens, room), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    ):
        if token == coder.eod:
            break
        new.append(token)
    seconds = time.monotonic() - started
    print(coder.decode(ids + new))
    print(f"({len(new)} tokens, {len(new) / max(seconds, 1e-9):.1f} tokens/s)")
    return 0
