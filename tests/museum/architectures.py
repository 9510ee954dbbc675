"""Seeded bugs of models whose stages exchange several tensors."""

from __future__ import annotations

from tests.museum.mutant import Mutant

EXECUTOR = "tests/parallel/test_executor.py::test_a_tuple_of_tensors_goes_through_any_schedule"

ARCHITECTURE_MUTANTS = (
    Mutant(
        "passed-tensor-freed-after-sending",
        "megapre/parallel/pipeline/executor.py",
        "[x for x in tensors if not _within(x, held)]",
        "tensors",
        f"{EXECUTOR}[False-1f1b-4-1]",
        "a stage frees what it has sent, though its own backward reads the encoder's output that it handed on",
    ),
    Mutant(
        "gradient-of-a-passed-tensor-lost-at-a-stage",
        "megapre/parallel/pipeline/executor.py",
        "both = [(y, g) for y, g in zip(outputs, gradients, strict=True) if g is not None]",
        "both = [(y, g) for y, g in zip(outputs, gradients) if g is not None and y.grad_fn]",
        f"{EXECUTOR}[False-1f1b-1-1]",
        "the encoder learns only from the decoder block next to it",
    ),
    Mutant(
        "unused-gradient-left-out-of-the-message",
        "megapre/parallel/pipeline/executor.py",
        "tuple(torch.zeros_like(x) if g is None else g for x, g in needed)",
        "tuple(g for x, g in needed if g is not None)",
        f"{EXECUTOR}[False-interleaved-2-4]",
        "a stage that reads one tensor of two sends back one gradient, and the stage before takes it for the other",
    ),
)
