"""Seeded bugs of objectives and their data path: what leaks, what is drawn wrongly, what is lost."""

from __future__ import annotations

from tests.museum.mutant import Mutant

FOLDER = "tests/objectives/test_objectives.py"
MASKED = "tests/objectives/test_masked.py"
READ = "tests/data/test_objective_data.py"

OBJECTIVE_MUTANTS = (
    Mutant(
        "masks-drawn-without-the-sample",
        "megapre/objectives/draw.py",
        "key=[setting.seed % 2**64, number]",
        "key=[setting.seed % 2**64, 0]",
        FOLDER,
        "pytorch #5059: workers share one seed",
    ),
    Mutant(
        "one-word-many-fates",
        "megapre/objectives/masked.py",
        "share = shares(kind[units])",
        "share = shares(kind[chosen])",
        f"{MASKED}::test_shares[word]",
        "whole-word masking that keeps and hides parts of one word",
    ),
    Mutant(
        "words-run-on-over-documents",
        "megapre/objectives/units.py",
        "                if word > first and bounds[word, 0] != bounds[word - 1, 1]:\n                    break\n",
        "",
        f"{MASKED}::test_spans_are_runs_of_neighbours",
        "a span that goes on behind an end-of-document token",
    ),
    Mutant(
        "prefix-asked-in-plain-sight",
        "megapre/objectives/prefix.py",
        "example.weights[: prefix - 1] = 0.0",
        "example.weights[: prefix // 2] = 0.0",
        f"{FOLDER}::test_a_prefix_is_only_read",
        "loss on tokens that the bidirectional prefix shows",
    ),
    Mutant(
        "prefix-not-seen",
        "megapre/models/attention.py",
        "prefix=ctx.prefix",
        "prefix=None",
        "tests/equivalence/test_architectures.py::test_family_agrees_with_the_oracle[prefix-2x1x1+sp]",
        "a prefix mask that the attention path silently ignores (as flash-attention #161 documents)",
    ),
    Mutant(
        "infill-cuts-in-any-order",
        "megapre/objectives/infill.py",
        "low, high = sorted(draw.below(len(body) + 1, 2).tolist())",
        "low, high = draw.below(len(body) + 1, 2).tolist()",
        f"{FOLDER}::test_infill_can_be_undone",
        "a middle that is lost where the second cut is before the first",
    ),
    Mutant(
        "infill-truncates-what-it-rearranged",
        "megapre/objectives/infill.py",
        "part = _rearrange(part[: room - ADDED], bool(orders[index] < setting.fim_spm_rate), draw, setting)",
        "part = _rearrange(part, bool(orders[index] < setting.fim_spm_rate), draw, setting)[:room]",
        f"{FOLDER}::test_infill_can_be_undone",
        "rearranged documents cut at the end of the row: the middle asked for is missing",
    ),
    Mutant(
        "decoder-reads-its-own-answer",
        "megapre/objectives/span_corruption.py",
        "np.concatenate(([setting.start], target[:-1]))",
        "target.copy()",
        f"{FOLDER}::test_span_corruption_can_be_undone_and_fills_both_sides",
        "decoder inputs that are not shifted",
    ),
    Mutant(
        "targets-keep-no-sentinels-apart",
        "megapre/objectives/span_corruption.py",
        "np.insert(tokens[covered], np.cumsum(hidden) - hidden, sentinels)",
        "np.insert(tokens[covered], np.cumsum(hidden) - hidden, sentinels[::-1])",
        f"{FOLDER}::test_span_corruption_can_be_undone_and_fills_both_sides",
        "sentinels that count one way in the source and the other in the target",
    ),
    Mutant(
        "masks-side-by-side",
        "megapre/objectives/denoising.py",
        "gaps = draw.subset(left + 1, masks)",
        "gaps = np.sort(draw.below(left + 1, masks))",
        f"{FOLDER}::test_infilling_can_be_aligned_and_lengths_are_poissons",
        "spans that meet, so that their number tells more than it should",
    ),
    Mutant(
        "target-in-the-content-stream",
        "megapre/objectives/permuted.py",
        "1 + draw.order(len(chosen))",
        "draw.order(len(chosen))",
        f"{FOLDER}::test_permuted_predicts_the_end_of_a_random_order",
        "the first predicted token has the context's rank: all content sees it",
    ),
    Mutant(
        "padding-is-attended",
        "megapre/objectives/pair.py",
        "segments=(places >= used).astype(np.int64)",
        "segments=(places >= length).astype(np.int64)",
        f"{FOLDER}::test_pairs_are_laid_out_as_bert_reads_them",
        "padding that is read as text",
    ),
    Mutant(
        "separators-are-hidden",
        "megapre/objectives/pair.py",
        "    able[[0, len(first) + 1, used - 1]] = False\n",
        "",
        f"{FOLDER}::test_pairs_are_laid_out_as_bert_reads_them",
        "[CLS] and [SEP] among the masked tokens",
    ),
    Mutant(
        "random-next-sentence-of-the-same-document",
        "megapre/data/samples.py",
        "if source.dataset.document_at(drawn[0][0])[0] != own:",
        "if drawn != spans:",
        f"{READ}::test_the_random_text_is_of_another_document",
        "BERT's negative pairs taken from the document itself",
    ),
    Mutant(
        "padding-of-a-validation-has-a-label",
        "megapre/data/loader.py",
        "weights=np.zeros_like(filler.weights), label_weight=0.0",
        "weights=np.zeros_like(filler.weights)",
        f"{READ}::test_validation_counts_every_label_once",
        "the accuracy of a head counted over samples that are there to fill up",
    ),
    Mutant(
        "labels-of-the-neighbours",
        "megapre/data/loader.py",
        'labels=_row(arrays["label"], torch.int64),',
        'labels=_row(arrays["label"][::-1], torch.int64),',
        "tests/training/test_learning.py::test_the_order_of_counted_sentences_is_learnt",
        "labels in another order than their texts: every number is finite and the loss stays at ln 2",
    ),
)
