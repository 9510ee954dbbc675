"""What verify runs: layouts, written as ``TPxPPxDP`` with options behind ``+``, and small hostile jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Any

import torch

from megapre.config.schema import Config
from megapre.data.loader import Microbatch

OFFLOADS = {"none": "", "optimizer": "+offload", "parameters": "+offload-parameters"}
"""How a layout's name tells ``parallel.offload``."""


@dataclass(frozen=True)
class Cell:
    """One layout."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    zero: int = 0
    schedule: str = ""
    """Empty: the job's own."""
    chunks: int = 1
    context: int = 1
    method: str = "ring"
    offload: str = "none"
    expert: int = 1
    expert_tensor: int = 1
    recompute: str = ""
    """Empty: the job's own."""

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    def __str__(self) -> str:
        name = f"{self.tensor}x{self.pipeline}x{self.data}"
        name += f"+{self.method}:{self.context}" if self.context > 1 else ""
        name += f"+ep:{self.expert}" if self.expert > 1 else ""
        name += f"+etp:{self.expert_tensor}" if self.expert_tensor > 1 else ""
        name += ("+sp" if self.sequence else "") + (f"+zero{self.zero}" if self.zero else "")
        name += OFFLOADS[self.offload]
        name += (f"+{self.schedule}" if self.schedule else "") + (f":{self.chunks}" if self.chunks > 1 else "")
        return name + (f"+recompute:{self.recompute}" if self.recompute else "")

    def apply(self, config: Config) -> Config:
        """``config`` on this layout; its ``layers_per_stage`` stays where it fits."""
        parallel = replace(
            config.parallel, tensor=self.tensor, pipeline=self.pipeline, data=self.data, sequence=self.sequence,
            zero=self.zero, context=self.context, context_method=self.method, offload=self.offload, expert=self.expert,
            expert_tensor=self.expert_tensor,
        )  # fmt: skip
        if self.schedule:
            parallel = replace(parallel, schedule=self.schedule, chunks=self.chunks)
        if self.recompute:
            parallel = replace(parallel, recompute=self.recompute)
        split = parallel.layers_per_stage
        if len(split) != self.pipeline * parallel.chunks or sum(split) != config.model.blocks:
            parallel = replace(parallel, layers_per_stage=[])
        return replace(config, parallel=parallel)


def parse(text: str) -> Cell:
    """The cell that ``text`` names; ValueError when it names none.

    ``TPxPPxDP``, then in any order ``+ring:CP`` or ``+ulysses:CP``, ``+ep:EP``, ``+etp:ETP``, ``+sp``, ``+zero1`` to
    ``+zero3``, ``+offload`` (optimizer state) or ``+offload-parameters``, ``+SCHEDULE[:CHUNKS]``,
    ``+recompute:POLICY``.
    """
    sizes, *options = text.split("+")
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", sizes)
    if match is None:
        raise ValueError(
            f"{text!r} is no layout: write TPxPPxDP with sizes of at least 1, and options such as +sp, +zero1, +ring:2 "
            f"or +interleaved:2 behind it, for example 2x2x2+sp+zero1."
        )
    tensor, pipeline, data = (int(size) for size in match.groups())
    cell = Cell(tensor, pipeline, data)
    for option in options:
        name, _, number = option.partition(":")
        if name == "recompute":  # config/check.py knows the policies
            cell = replace(cell, recompute=number)
            continue
        if number and not re.fullmatch(r"[1-9]\d*", number):
            raise ValueError(f"{option!r} in layout {text!r} ends in no number of at least 1.")
        if option == "sp":
            cell = replace(cell, sequence=True)
        elif re.fullmatch(r"zero\d", option):
            cell = replace(cell, zero=int(option[4:]))
        elif f"+{option}" in OFFLOADS.values():
            cell = replace(cell, offload=next(key for key, text in OFFLOADS.items() if text == f"+{option}"))
        elif name in ("ring", "ulysses"):
            cell = replace(cell, method=name, context=int(number or 1))
        elif name == "ep":
            cell = replace(cell, expert=int(number or 1))
        elif name == "etp":
            cell = replace(cell, expert_tensor=int(number or 1))
        else:  # config/check.py knows the schedules
            cell = replace(cell, schedule=name, chunks=int(number or 1))
    return cell


def every(
    ranks: int,
    sizes: tuple[int, ...] = (1, 2, 4),
    data: tuple[int, ...] = (1, 2),
    zero: tuple[int, ...] = (0, 1),
    experts: int = 0,
) -> Iterator[Cell]:
    """All distinct layouts over these sizes and, where there are replicas, ZeRO stages that fit ``ranks``.

    With ``experts``, also with the experts dealt out as far as they go.
    """
    for tensor in sizes:
        for pipeline in sizes:
            for replicas in data:
                if tensor * pipeline * replicas > ranks:
                    continue
                for sequence in (False, True) if tensor > 1 else (False,):
                    for stage in zero if replicas > 1 else (0,):
                        cell = Cell(tensor, pipeline, replicas, sequence, stage)
                        spread = gcd(experts, tensor * replicas)
                        yield from [cell, replace(cell, expert=spread)] if spread > 1 and experts else [cell]


SCALE = 1024.0
"""Largest fp16 loss scale of a proof: no step of it may overflow, or arm B would compare skipped steps."""


SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "span_corruption": (20, {"mask_probability": 0.43, "mask_span": 4.0}),
    "denoising": (12, {"mask_probability": 0.5, "mask_span": 2.0, "delete_probability": 0.0}),
}
"""Tokens of the source beside a target of 16, and settings of the objective that make them so; 4 ranks divide both."""


def scaled_down(config: Config) -> tuple[Config, int]:
    """The job at a size that a laptop proves in seconds, made hostile; returns it with a vocabulary size.

    Layers and vocabulary divide by no axis, heads have 13 or 14 features, there are at least 3 buckets, a rank has
    several microbatches, and the gradient is clipped. What the job's code path depends on (norm, activation,
    positions, GQA, biases, tying, dropout, precision, kernels) is kept; a window and RoPE's scaling act on so few
    tokens. Adam's eps is about the size of a gradient
    element, so that a weight's error measures its gradient's: a small eps would turn rounding noise around 0 into
    whole steps, and a gradient wrong by a constant factor into the same step.
    """
    m = config.model
    grouped = 4 if m.n_kv_heads == m.heads else (1 if m.n_kv_heads == 1 else 2)
    hidden = 56 if m.positions == "rope" else 52  # 14 or 13 features a head: no power of two, and odd where it may be
    model = replace(
        m, layers=5, hidden=hidden, heads=4, kv_heads=grouped, ffn_hidden=100, vocab_size=67, sequence=16, init_std=0.15
    )
    data = config.data
    if m.encoder_layers:
        model = replace(model, layers=4, encoder_layers=3, source_sequence=SOURCES[data.objective][0])
        data = replace(data, **SOURCES[data.objective][1])
    if m.generator_layers:  # the generator's heads are cut as the discriminator's
        model = replace(
            model, layers=4, generator_layers=3, heads=8, kv_heads=0, hidden=2 * hidden, generator_hidden=hidden,
            ffn_hidden=104,
        )  # fmt: skip
    if m.experts:
        model = replace(
            model, experts=8, experts_per_token=min(3, m.experts_per_token), expert_hidden=36,
            shared_experts=min(2, m.shared_experts), moe_every=min(2, m.moe_every),
            moe_dense_first=min(1, m.moe_dense_first),
        )  # fmt: skip
    sizes: dict[str, Any] = {"head_size": 10, "window": 5, "rope_original": 64, "embedding_size": 20}
    model = replace(model, **{name: size for name, size in sizes.items() if getattr(m, name)})
    if m.generator_layers and m.tied_embeddings and not m.mlm_transform:  # the output layer reads the generator
        model = replace(model, embedding_size=model.generator_hidden)
    if m.positions == "t5":
        model = replace(model, relative_buckets=8, relative_distance=12)
    if m.relative_clamp:
        model = replace(model, relative_clamp=9)
    train = replace(
        config.train, global_batch=4, microbatch=1, steps=10, device="cpu", threads=1, batch_ramp=[], sequence_ramp=[]
    )
    optimizer = replace(config.optimizer, clip=config.optimizer.clip and 0.5, eps=1e-3)
    precision = replace(config.precision, initial_loss_scale=min(SCALE, config.precision.initial_loss_scale))
    schedule = replace(config.schedule, unit="steps", warmup=2, decay=0)
    small = replace(
        config, model=model, data=data, train=train, optimizer=optimizer, schedule=schedule, precision=precision
    )
    return replace(small, parallel=replace(config.parallel, bucket_elements=4_000)), 67


def batches(config: Config, vocab_size: int, steps: int) -> list[list[Microbatch]]:
    """Made-up global batches, one sample per microbatch, with very uneven numbers of target tokens.

    A pure function of ``data.seed``. With ``data.reset_attention`` samples hold several documents. The second half of
    the steps is a second epoch: the same texts in another order, under new sample numbers.
    """
    generator = torch.Generator().manual_seed(config.data.seed)
    count = config.train.global_batch
    once = _samples(config, vocab_size, count * -(-steps // 2), generator)
    again = [once[i] for i in torch.randperm(len(once), generator=generator).tolist()]
    run = [replace(m, samples=torch.tensor([number])) for number, m in enumerate(once + again)]
    return [run[step * count : (step + 1) * count] for step in range(steps)]


def _samples(config: Config, vocab_size: int, count: int, generator: torch.Generator) -> list[Microbatch]:
    length = config.model.sequence
    batch = []
    for index in range(count):
        tokens = torch.randint(vocab_size, (length + 1, 1), generator=generator)
        tokens[0] = vocab_size - 1  # the last real id, beside the padding
        share = torch.rand((), generator=generator) ** 3
        weights = (torch.rand(length, 1, generator=generator) < share).float()
        weights[-1] = 1.0
        documents = (torch.rand(length, 1, generator=generator) < 0.2).long().cumsum(0)
        positions = torch.arange(length).unsqueeze(1)
        prefix = torch.tensor([(3 * index + 1) % length + 1])
        if config.data.reset_positions:
            starts = torch.cat((torch.zeros(1, 1).bool(), documents[1:] != documents[:-1]))
            positions = positions - torch.where(starts, positions, 0).cummax(0).values
        batch.append(
            Microbatch(
                tokens[:-1].contiguous(),
                tokens[1:].contiguous(),
                weights,
                positions.contiguous(),
                documents if config.data.reset_attention or _packed(config) else None,
                torch.tensor([index]),
                prefix=prefix if config.data.objective == "prefix" else None,
                **_extras(config, index, generator),
                **_source(config, vocab_size, generator),
            )
        )
    return batch


def _extras(config: Config, index: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What only some models read: types in two stretches, labels of which some do not count."""
    model, found = config.model, {}
    place = torch.arange(model.sequence).unsqueeze(1)
    cut = torch.randint(model.sequence, (1,), generator=generator)
    if model.token_types:
        found["token_types"] = (place > cut).long() * (model.token_types - 1)
    if model.architecture == "two_stream":  # half of the tokens are only read, the others follow in random order
        order = torch.randperm(model.sequence, generator=generator).unsqueeze(1)
        found["ranks"] = (order - model.sequence // 2).clamp_min(0)
    if model.sentence_classes:
        found["labels"] = torch.randint(model.sentence_classes, (1,), generator=generator)
        found["label_weights"] = torch.tensor([float(index % 4 != 1)])
    return found


def _source(config: Config, vocab_size: int, generator: torch.Generator) -> dict[str, torch.Tensor | None]:
    """What an encoder reads; of several documents, of which some have no target and some targets have none."""
    length = config.model.source_sequence
    if not length:
        return {}
    documents = (torch.rand(length, 1, generator=generator) < 0.15).long().cumsum(0)
    return {
        "source": torch.randint(vocab_size, (length, 1), generator=generator),
        "source_segments": documents if _packed(config) else None,
    }


def _packed(config: Config) -> bool:
    """Whether source and target hold several documents: under one of the objectives of encoder-decoders."""
    return config.data.objective == "span_corruption"


def share(batch: list[Microbatch], rank: int, size: int, microbatch: int) -> list[Microbatch]:
    """The microbatches of data rank ``rank``, by the loader's rule."""
    count = len(batch) // (size * microbatch)
    return [
        join(batch[(m * size + rank) * microbatch : (m * size + rank + 1) * microbatch]) for m in range(count)
    ]


def join(samples: list[Microbatch]) -> Microbatch:
    """One microbatch of several samples."""
    made: dict[str, Any] = {}
    for name in (f.name for f in fields(Microbatch)):
        rows = [getattr(sample, name) for sample in samples]
        made[name] = None if rows[0] is None else torch.cat(rows, dim=-1)
    return Microbatch(**made)
