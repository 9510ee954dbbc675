import math
import os
import subprocess
import sys

import pytest
import torch

from megapre.random import native, philox

BUILT = pytest.mark.skipif(bool(native.load()), reason=native.load())
ALL = 0xFFFFFFFF
# Published with Random123 (Salmon et al., SC'11): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Boxes (shape, offset, size): whole, inner, ragged, one element, empty, scalar, beyond 2^32 elements.
BOXES = [
    ((37, 53), (0, 0), (37, 53)),
    ((37, 53), (5, 17), (20, 9)),
    ((7, 5, 3), (1, 2, 1), (3, 2, 2)),
    ((7, 5, 3), (2, 0, 0), (3, 5, 3)),
    ((1031,), (1030,), (1,)),
    ((70_001,), (3,), (69_997,)),
    ((4, 0), (0, 0), (4, 0)),
    ((6, 4), (2, 1), (0, 3)),
    ((), (), ()),
    ((2**20, 2**14), (2**20 - 2, 3), (2, 501)),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors(counter, key, expected):
    words = philox.philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in words) == expected


@BUILT
@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors_cpp(counter, key, expected):
    assert tuple(torch.ops.megapre.philox(list(counter), list(key))) == expected


@BUILT
@pytest.mark.parametrize("shape, offset, size", BOXES)
def test_normal_cpp_is_the_reference_bit_for_bit(shape, offset, size):
    ours = philox.normal(5, "blocks.0.mlp", shape, offset, size)
    assert torch.equal(ours, philox.normal_reference(5, "blocks.0.mlp", shape, offset, size))
    assert ours.shape == torch.Size(size) and ours.dtype == torch.float32


@pytest.mark.parametrize("draw", [philox.normal, philox.normal_reference])
def test_a_box_is_the_slice_of_the_whole(draw):
    shape = (19, 12, 7)
    whole = draw(1, "w", shape, (0, 0, 0), shape)
    for offset, size in [((3, 2, 1), (5, 9, 4)), ((0, 6, 0), (19, 6, 7)), ((18, 11, 6), (1, 1, 1))]:
        box = whole[tuple(slice(o, o + n) for o, n in zip(offset, size))]
        assert torch.equal(draw(1, "w", shape, offset, size), box)


def test_normal_is_box_muller_of_the_words():
    words = philox.name_words(3, "w")
    x = [int(word) for word in philox.philox([torch.tensor([w]) for w in (2, 0, *words[2:])], words[:2])]
    expected = []
    for a, b in ((x[0], x[1]), (x[2], x[3])):
        radius, angle = math.sqrt(-2 * math.log((a + 1) / 2**32)), 2 * math.pi * b / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    # The house's polynomials and libm agree to about 1e-15, far below one fp32 unit in the last place (6e-8).
    torch.testing.assert_close(
        philox.normal(3, "w", (100,), (8,), (4,)), torch.tensor(expected), rtol=1.2e-7, atol=1e-9
    )


def test_polynomials_at_the_edges():
    x = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31, 3 * 2**30, 2**32 - 2**29, ALL - 1, ALL])
    cosine, sine = philox._cos_sin(x)
    angle = x.double() / 2**32 * (2 * math.pi)
    torch.testing.assert_close(cosine, angle.cos(), rtol=0, atol=2e-15)
    torch.testing.assert_close(sine, angle.sin(), rtol=0, atol=2e-15)
    exact = torch.tensor([math.sqrt(-2 * math.log((int(v) + 1) / 2**32)) for v in x], dtype=torch.float64)
    torch.testing.assert_close(philox._radius(x), exact, rtol=1e-15, atol=0)


def test_normal_moments_and_independence():
    count = 1_000_000
    a, b, c = (philox.normal(*key, (count,), (0,), (count,)).double() for key in ((1, "a"), (1, "b"), (2, "a")))
    # Six standard errors of each estimate.
    assert abs(a.mean()) < 6e-3 and abs(a.var() - 1) < 6 * 1.42e-3 and abs((a**4).mean() - 3) < 6 * 9.8e-3
    for left, right in ((a, b), (a, c), (a[:-1], a[1:]), (a[:-2], a[2:])):
        assert abs((left * right).mean()) < 6e-3
    assert 4.4 < a.abs().max() < 6.7


def test_normal_refuses_a_box_outside():
    with pytest.raises(ValueError, match=r"box at \[3\] of size \[8\] is not inside w of shape \[10\]"):
        philox.normal(1, "w", (10,), (3,), (8,))


MASKS = [(0, 8, 0.1), (3, 7, 0.5), (5, 1025, 0.9), (1, 1, 0.0), (2, 0, 0.3), (2**20 + 1, 300, 0.999999)]
POSITIONS, SAMPLES = torch.tensor([0, 9, 2**31]), torch.tensor([0, 5, 2**33 + 5, 2**40])


@BUILT
@pytest.mark.parametrize("first, features, probability", MASKS)
def test_keep_mask_cpp_is_the_reference_bit_for_bit(first, features, probability):
    arguments = (9, 77, [1, 2**31], POSITIONS, SAMPLES, first, features, probability)
    ours = philox.keep_mask(*arguments)
    assert ours.shape == (2, 3, 4, features) and ours.dtype == torch.bool
    assert torch.equal(ours, philox.keep_mask_reference(*arguments))


@pytest.mark.parametrize("draw", [philox.keep_mask, philox.keep_mask_reference])
def test_keep_mask_does_not_depend_on_the_layout(draw):
    positions, samples = torch.arange(12), torch.arange(100, 106)
    whole = draw(4, 2, [10, 11, 12], positions, samples, 0, 64, 0.25)
    part = draw(4, 2, [12], positions[5:9], samples[2:3], 13, 30, 0.25)
    assert torch.equal(part, whole[2:, 5:9, 2:3, 13:43])


def test_keep_mask_rate_and_what_changes_it():
    positions, samples = torch.arange(100), torch.arange(10)
    base = dict(seed=1, step=0, sites=[0], positions=positions, samples=samples, first=0, features=1000)
    for probability in (0.0, 0.1, 0.5):
        kept = philox.keep_mask(**base, probability=probability).double().mean()
        assert abs(kept - (1 - probability)) <= 6 * math.sqrt(probability * (1 - probability) / 1e6)
    mask = philox.keep_mask(**base, probability=0.5)
    for change in (
        dict(seed=2), dict(step=1), dict(sites=[1]), dict(positions=torch.arange(100, 200)),
        dict(samples=torch.arange(2**32, 2**32 + 10)), dict(first=4),
    ):  # fmt: skip
        other = philox.keep_mask(**{**base, **change}, probability=0.5)
        assert abs((mask == other).double().mean() - 0.5) < 6 * 0.5e-3, change


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_keep_mask_refuses_a_probability(probability):
    with pytest.raises(ValueError, match="must be in"):
        philox.keep_mask(1, 1, [0], torch.arange(2), torch.arange(2), 0, 4, probability)


DRAWS = """
import torch
from megapre.random import native, philox
native.load()
x = philox.normal(5, "w", (301, 77), (2, 3), (290, 70)).view(torch.int32).long().sum()
m = (philox.keep_mask(1, 2, [3], torch.arange(50), torch.arange(4), 1, 333, 0.3).int() * torch.arange(333)).sum()
d = torch.ops.megapre.dropout(torch.ones(5, 4, 333), 1, 2, 3, torch.arange(5), torch.arange(4), 0.3).nonzero().sum()
drawn = (torch.ops.megapre.cpu_variant(), int(x), int(m), int(d))
"""


@BUILT
@pytest.mark.parametrize("variant", ["portable", pytest.param("avx2", marks=pytest.mark.nightly)])
def test_every_instruction_set_draws_the_same_bits(variant):
    here: dict = {}
    exec(DRAWS, here)
    command = [sys.executable, "-c", DRAWS + "print(*drawn)"]
    there = subprocess.run(
        command, env={**os.environ, "MEGAPRE_CPU": variant}, capture_output=True, text=True, check=True
    ).stdout.split()
    if there[0] != variant:
        pytest.skip(f"this machine has no {variant}")
    assert [int(number) for number in there[1:]] == list(here["drawn"][1:])
