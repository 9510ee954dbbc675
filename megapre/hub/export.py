"""A checkpoint of any layout as a folder that ``transformers`` opens with ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megapre.checkpoint import store
from megapre.config.schema import Config
from megapre.hub.families import Family, family, family_of
from megapre.hub.folder import INDEX, SINGLE
from megapre.hub.link import Link, their_shapes
from megapre.hub.settings import PART
from megapre.models.spec import tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model",
)  # fmt: skip
SHARD_BYTES = 5 * 10**9


def export(
    checkpoint: Path, folder: Path, config: Config, vocab_size: int, *, kind: str = "", dtype: str = "fp32",
    tokenizer: Path | None = None, shard_bytes: int = SHARD_BYTES,
) -> Family:  # fmt: skip
    """Write the weights of ``checkpoint`` to ``folder``, in files of at most ``shard_bytes``; returns the family.

    ``kind``: the ``model_type``; empty: the first that can be this model. ``tokenizer``: a folder whose tokenizer files
    are copied. What was trained beside the model gets a folder of its own in it (`PART`). The master weights are
    rounded once, to ``dtype``. Raises ValueError when no family can be this model or ``folder`` is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: export to a new folder.")
    target = family(kind) if kind else family_of(config.model, vocab_size)
    values = target.write(config.model, vocab_size)
    shapes = {spec.name: spec.shape for spec in tensors(config.model, vocab_size)}
    links, beside = target.links(config.model, target.kind), values.pop(PART, None)
    for name, told in (("", values), (f"{PART}/", beside)):
        if told is not None:
            mine = [link for link in links if link.theirs.startswith(f"{PART}/") == bool(name)]
            mine = [replace(link, theirs=link.theirs.removeprefix(name)) for link in mine]
            told = told | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
            _write(folder / name, told, _shards(checkpoint, mine, shapes, DTYPES[dtype], shard_bytes), tokenizer)
    return target


def _write(folder: Path, values: dict[str, Any], shards: Iterator[dict[str, Tensor]], tokenizer: Path | None) -> None:
    """One folder: settings, tensors, and the files of a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[tuple[str, list[str]]] = []
    total = 0
    for number, held in enumerate(shards):
        files.append((f"part-{number}.safetensors", list(held)))
        save_file(held, folder / files[-1][0], metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in held.values())
    _name_files(folder, files, total)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for name in TOKENIZER_FILES if tokenizer else ():
        if tokenizer is not None and (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)


def _shards(
    checkpoint: Path, every: list[Link], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int
) -> Iterator[dict[str, Tensor]]:
    """Tensors of theirs that the links name, in groups of at most ``limit`` bytes; ``shapes`` are of ours."""
    holding: dict[str, list[Link]] = {}
    """Their tensor -> the tensors of ours that it holds."""
    for link in every:
        holding.setdefault(link.theirs, []).append(link)
    sizes = their_shapes([link for links in holding.values() for link in links], shapes)
    group: dict[str, Tensor] = {}
    for name, links in holding.items():
        tensor = torch.zeros(sizes[name], dtype=dtype)
        if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > limit:
            yield group
            group = {}
        for link in links:
            offset, size = link.box(shapes[link.ours])
            value = store.whole(checkpoint, f"weight/{link.ours}")
            value = value.T if link.transposed else value
            tensor[tuple(slice(o, o + n) for o, n in zip(offset, size))] = value.reshape(size)
        group[name] = tensor
    yield group


def _name_files(folder: Path, files: list[tuple[str, list[str]]], total: int) -> None:
    """Final names, which tell how many files there are, and the index of several."""
    if len(files) == 1:
        (folder / files[0][0]).rename(folder / SINGLE)
        return
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / file).rename(folder / final)
        places |= dict.fromkeys(names, final)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n")
