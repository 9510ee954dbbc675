"""Seeded bugs of conversion of other families than those of ``state.py``."""

from __future__ import annotations

from tests.museum.mutant import Mutant

THEIRS = "tests/hub/test_families.py::test_logits_and_gradients_are_theirs"
BITWISE = "tests/hub/test_families.py::test_exports_are_bitwise_the_import_and_open_there"

HUB_MUTANTS = (
    Mutant(
        "export-forgets-the-scaled-frequencies",
        "megapre/hub/llama.py",
        '"rope_scaling": rope_scaling(m),',
        '"rope_scaling": None,',
        f"{BITWISE}[llama3]",
        "every tensor is right and the exported model turns q and k by other angles",
    ),
    Mutant(
        "import-forgets-the-frequencies-ramp",
        "megapre/hub/llama.py",
        'given.number("low_freq_factor")',
        'given.number("high_freq_factor")',
        f"{THEIRS}[llama3-1x1x1]",
        "Llama 3.1's scaling with one bound for two",
    ),
    Mutant(
        "encoder-decoder-exported-untied",
        "megapre/hub/t5.py",
        '"tie_word_embeddings": m.output_scale != 1,',
        '"tie_word_embeddings": False,',
        f"{BITWISE}[t5]",
        "torchtitan PR #3764, in kind: a tied T5 without the scale of its logits, its output layer drawn anew",
    ),
    Mutant(
        "positions-from-the-row-of-padding",
        "megapre/hub/bart.py",
        "(FIRST_POSITION, 0)",
        "(FIRST_POSITION - 1, 0)",
        f"{THEIRS}[bart-1x1x1]",
        "every position is the one before it",
    ),
    Mutant(
        "gate-taken-for-up",
        "megapre/hub/mixtral.py",
        '{"gate": "w1", "up": "w3", "down": "w2"}',
        '{"gate": "w3", "up": "w1", "down": "w2"}',
        f"{THEIRS}[mixtral-1x1x1]",
        "two matrices of one shape exchanged: export and import agree, and the model is another",
    ),
    Mutant(
        "keys-taken-for-values",
        "megapre/hub/gpt2.py",
        'enumerate("qkv")',
        'enumerate("qvk")',
        f"{THEIRS}[gpt2-2x2x1+sp]",
        "parts of a fused matrix in another order",
    ),
    Mutant(
        "generators-heads-not-compared",
        "megapre/hub/bert.py",
        "        if ours != theirs:\n            raise ValueError(\n                f\"{beside.where} has",
        "        if False:\n            raise ValueError(\n                f\"{beside.where} has",
        "tests/hub/test_electra.py::test_what_is_no_pair_is_refused",
        "a generator of as many features in other heads is read as if it had ours",
    ),
    Mutant(
        "a-generators-own-embedding-is-taken",
        "megapre/hub/load.py",
        "            if not one.equal(other):",
        "            if not one.equal(other) and name.count('/') == 0:",
        "tests/hub/test_electra.py::test_what_is_no_pair_is_refused",
        "ELECTRA's two models are read with the embedding of one of them, though they differ",
    ),
)
