"""Seeded bugs of training strategies: growth of a smaller model, a share of the data, what is forgotten."""

from __future__ import annotations

from tests.museum.mutant import Mutant

LOADER = "tests/data/test_loader.py"
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
    Mutant(
        "fraction-of-validation-too",
        "megapre/data/samples.py",
        "documents[0] = first, first + math.ceil((last - first) * data.fraction)",
        "documents = [(a, a + math.ceil((b - a) * data.fraction)) for a, b in documents]",
        f"{LOADER}::test_a_fraction_is_whole_documents_each_once_an_epoch_and_leaves_validation_alone",
        "losses of fractions that are told on different text",
    ),
    Mutant(
        "loss-on-a-path-is-that-of-all",
        "megapre/data/loader.py",
        "replace(config.data, paths=[path], weights=[], stages=[])",
        "replace(config.data)",
        f"{LOADER}::test_validation_by_path_reads_each_path_alone_whatever_the_others",
        "new text that is learnt hides old text that is forgotten",
    ),
)
