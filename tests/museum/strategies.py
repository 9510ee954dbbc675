"""Seeded bugs of training strategies: growth of a smaller model."""

from __future__ import annotations

from tests.museum.mutant import Mutant

GROW = "tests/models/test_grow.py::test_outputs_stay"

STRATEGY_MUTANTS = (
    Mutant(
        "growth-forgets-to-divide",
        "megapre/models/grow.py",
        "            grown /= copies[place]\n",
        "",
        f"{GROW}[llama width-0.0]",
        "every product sums over all copies of a feature",
    ),
    Mutant(
        "growth-forgets-the-tied-head",
        "megapre/models/grow.py",
        "    factor *= width / new_width\n",
        "",
        f"{GROW}[gpt2 width-0.0]",
        "logits of a tied output layer are as many times too large as features have copies",
    ),
    Mutant(
        "growth-gives-queries-other-keys",
        "megapre/models/grow.py",
        "heads.append(source * group + taken[source] % group)",
        "heads.append(len(heads) % small.heads)",
        f"{GROW}[llama tied-0.0]",
        "heads are tiled one by one, so that with grouped keys a query reads another group's",
    ),
    Mutant(
        "growth-of-depth-by-copies",
        "megapre/models/grow.py",
        "factor = 0.0 if new and",
        "factor = factor if new and",
        f"{GROW}[gpt2 depth-0.0]",
        "a new block does what the one below has done already",
    ),
    Mutant(
        "growth-noise-does-not-cancel",
        "megapre/models/grow.py",
        "(drawn - mean[:, place])",
        "drawn",
        f"{GROW}[bert width-0.3]",
        "noise against equal copies that changes the outputs",
    ),
)
