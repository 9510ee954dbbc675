"""What all arms share: a job's token pair, its batches as one array, and its first weights in Hugging Face's format."""

from __future__ import annotations

import json
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megapre.config.check import check
from megapre.config.load import load
from megapre.config.schema import Config
from megapre.data.indexed import IndexedWriter, token_dtype
from megapre.data.loader import Loader
from megapre.hub.families import family_of
from megapre.hub.folder import SINGLE
from megapre.hub.link import their_shapes
from megapre.models.spec import tensors
from megapre.monitor.throughput import flops_per_token
from megapre.optim.schedule import learning_rate
from megapre.random.philox import normal

PASSES = 300
"""Batches that a pair holds about."""
WORD = re.compile(r"\w+|\s+|[^\w\s]")


def documents(vocab_size: int) -> Iterator[list[int]]:
    """The standard library's sources as ids: each word's checksum. Real frequencies, and no tokenizer is needed."""
    known: dict[str, int] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        words = WORD.findall(path.read_text(encoding="utf-8", errors="replace"))
        for word in set(words) - set(known):
            known[word] = zlib.crc32(word.encode()) % vocab_size
        if words:
            yield [known[word] for word in words]


def make_pair(prefix: Path, vocab_size: int, tokens: int) -> None:
    """Write about ``tokens`` ids under ``prefix`` unless a pair is there."""
    if prefix.with_name(prefix.name + ".idx").exists():
        return
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(str(prefix), token_dtype(vocab_size)) as writer:
        for ids in documents(vocab_size):
            writer.add_document(np.array(ids))
            if writer.tokens >= tokens:
                break


def read(path: Path, folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The job at ``path`` on its pair below ``folder``, which is made where it is missing."""
    config = load(path, overrides)
    prefix = folder / "data" / str(config.model.vocab_size)
    make_pair(prefix, config.model.vocab_size, PASSES * config.train.global_batch * config.model.sequence)
    return check(load(path, [*overrides, f'data.paths=["{prefix}"]', f"train.run_dir={folder / 'runs' / path.stem}"]))


def write_batches(config: Config, path: Path, steps: int) -> None:
    """The first ``steps`` batches in megapre's own order, int32 [steps, global batch, sequence + 1]."""
    loader = Loader(config, vocab_size=config.model.vocab_size, data_rank=0, data_size=1)
    every = []
    for step in range(steps):
        parts = loader.step_batch(step).microbatches
        tokens, targets = (torch.cat([getattr(m, name) for m in parts], 1).T for name in ("tokens", "targets"))
        every.append(torch.cat([tokens, targets[:, -1:]], 1).to(torch.int32))
    loader.close()
    np.save(path, torch.stack(every).numpy())


def write_weights(config: Config, folder: Path) -> None:
    """megapre's initial weights as a folder that transformers opens."""
    model, vocab = config.model, config.model.vocab_size
    family = family_of(model, vocab)
    specs = {spec.name: spec for spec in tensors(model, vocab)}
    links = family.links(model, family.kind)
    found = {name: torch.zeros(shape) for name, shape in
             their_shapes(links, {name: spec.shape for name, spec in specs.items()}).items()}  # fmt: skip
    for link in links:
        spec = specs[link.ours]
        value = torch.full(spec.shape, 1.0 if spec.init == "ones" else 0.0)
        if spec.init == "normal":
            value = normal(config.train.seed, spec.name, spec.shape, (0,) * len(spec.shape), spec.shape) * spec.std
        offset, size = link.box(spec.shape)
        found[link.theirs][tuple(slice(o, o + n) for o, n in zip(offset, size))] = value.T if link.transposed else value
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / SINGLE, metadata={"format": "pt"})
    settings = family.write(model, vocab) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(settings))


def peer_spec(config: Config, folder: Path, steps: int, compiled: bool, port: int) -> dict[str, Any]:
    """What ``peers.py`` is told; writes the files that it names below ``folder``."""
    write_batches(config, folder / "batches.npy", steps)
    write_weights(config, folder / "weights")
    model = config.model
    told = asdict(model) | {"kv_heads": model.n_kv_heads, "ffn_hidden": model.n_ffn}
    return {
        "model": told, "weights": str(folder / "weights"), "batches": str(folder / "batches.npy"), "port": port,
        "rates": [learning_rate(config, step) for step in range(steps)], "optimizer": asdict(config.optimizer),
        "dtype": config.precision.dtype, "threads": config.train.threads, "compile": compiled,
        "global_batch": config.train.global_batch, "microbatch": config.train.microbatch,
    }  # fmt: skip


def step_flops(config: Config) -> float:
    """Model FLOPs of an optimizer step, causal attention counted half."""
    tokens = config.train.global_batch * config.model.sequence
    return tokens * flops_per_token(config.model, config.model.vocab_size)


def parameters(config: Config) -> int:
    return sum(int(np.prod(spec.shape)) for spec in tensors(config.model, config.model.vocab_size))


def memory_needed(config: Config) -> int:
    """Bytes that a plain stack takes about: AdamW's 16 a parameter, logits in three copies, activations."""
    model, tokens = config.model, config.train.microbatch * config.model.sequence
    activations = 40 * tokens * model.hidden * model.layers * 2
    return 16 * parameters(config) + 10 * tokens * model.vocab_size + activations + (1 << 29)
