"""The flat buffer: every tensor has one place, fused neighbours touch, shards are equal and aligned."""

from __future__ import annotations

import random
from itertools import pairwise
from math import prod

import pytest

from megapre.config.schema import ModelConfig
from megapre.models import spec
from megapre.parallel.layout import ALIGNMENT, Layout

SEED = random.SystemRandom().randrange(10**6)


def drawn(seed: int) -> tuple[ModelConfig, int, dict[str, int]]:
    r = random.Random(seed)
    heads = r.choice([4, 8])
    model = ModelConfig(
        layers=r.randint(4, 9), hidden=heads * r.choice([6, 8, 10]), heads=heads, kv_heads=r.choice([1, 2, 4]),
        ffn_hidden=r.choice([100, 52]), bias=r.random() < 0.5, tied_embeddings=r.random() < 0.5,
        norm=r.choice(["layernorm", "rmsnorm"]), activation=r.choice(["gelu", "swiglu"]), sequence=16,
    )  # fmt: skip
    sizes = {"tensor": r.choice([1, 2, 4]), "pipeline": r.choice([1, 2, 4]), "replicas": r.choice([1, 2, 3])}
    return model, r.choice([64, 65, 67, 257]), sizes


@pytest.mark.parametrize("index", range(20))
def test_layouts_of_all_ranks_tile_every_tensor_once(index: int) -> None:
    model, vocab, sizes = drawn(SEED + index)
    specs = spec.tensors(model, vocab, sizes["tensor"])
    seen = {s.name: 0 for s in specs}
    for numbers in spec.stages(model, sizes["pipeline"], []):
        for rank in range(sizes["tensor"]):
            layout = Layout.build(
                specs, numbers, tensor_rank=rank, tensor_size=sizes["tensor"], replicas=sizes["replicas"],
                sequence_parallel=index % 2 == 0, bucket_elements=10_000,
            )  # fmt: skip
            position = 0
            for slot in layout.slots:
                assert slot.start >= position, SEED
                position = slot.end
                address = slot.address(0, layout.total)
                if slot.primary and address is not None:
                    seen[slot.spec.name] += address.end - address.start
                if slot.spec.fused:
                    after = layout.slots[layout.slots.index(slot) + 1]
                    assert after.start == slot.end, SEED
            assert position <= layout.total
            edges = [(b.start, b.end) for b in layout.buckets]
            assert edges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(edges))
            for bucket in layout.buckets:
                parts = [bucket.shard(r, sizes["replicas"]) for r in range(sizes["replicas"])]
                assert parts[0].start == 0 and parts[-1].stop == bucket.size
                assert all((part.stop - part.start) % ALIGNMENT == 0 for part in parts)
                assert not bucket.tied or all(slot.spec.layers == bucket.tied for slot in bucket.slots)
    assert seen == {s.name: prod(s.shape) for s in specs}, f"{SEED=} {index=}"


def test_uneven_blocks_go_to_the_middle() -> None:
    model = ModelConfig(layers=7)
    assert [len(r) for r in spec.stages(model, 4, [])] == [3, 2, 2, 2]  # with embedding and head: 2, 2, 2, 1 blocks
    assert spec.stages(model, 2, [3, 4]) == [range(0, 4), range(4, 9)]
