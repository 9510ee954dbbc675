"""Seeded bugs of what judges and predicts: verify's comparer and the planner."""

from __future__ import annotations

from tests.museum.mutant import Mutant

PROOF = (
    Mutant(
        "comparer-takes-the-best",
        "megapre/verify/run.py",
        "name = max(self.errors, key=",
        "name = min(self.errors, key=",
        "tests/verify/test_comparer.py::test_one_wrong_quantity_among_many_is_enough",
        "Megatron-LM PR #4238: a golden test passed when 1 % of the steps agreed",
    ),
    Mutant(
        "comparer-passes-nan",
        "megapre/verify/run.py",
        'return float("inf") if error != error else error / limit',
        "return error / limit",
        "tests/verify/test_comparer.py::test_nan_is_the_worst",
        "a comparison with NaN is never true",
    ),
    Mutant(
        "overflowing-baseline-allows-all",
        "megapre/verify/run.py",
        "if not math.isfinite(worst):",
        "if worst != worst:",
        "tests/verify/test_comparer.py::test_a_baseline_that_overflows_allows_nothing",
        "fp16 steps that overflow on one rank as on many agree about nothing",
    ),
    Mutant(
        "comparer-averages-over-ranks",
        "megapre/verify/run.py",
        "worst[name] = max(worst.get(name, 0.0), difference / max(true, floor, 1e-300))",
        "worst[name] = difference / max(true, floor, 1e-300)",
        "tests/verify/test_comparer.py::test_one_rank_with_another_loss_is_enough",
        "Megatron-LM PR #4238: the last wrong step or rank went unnoticed",
    ),
    Mutant(
        "replica-check-needs-three-opinions",
        "megapre/verify/run.py",
        "len(values) > 1 for values",
        "len(values) > 2 for values",
        "tests/verify/test_comparer.py::test_one_flipped_bit_in_one_replica_is_seen",
        "Megatron-LM !2362: the detector of silent corruption compared over the wrong group",
    ),
    Mutant(
        "planner-ring-moves-all-bytes",
        "megapre/planner/network.py",
        "moved = (ranks - 1) * (size / ranks",
        "moved = ranks * (size / ranks",
        "tests/planner/test_timing.py::test_rings_cost_what_the_formula_says",
        "a ring of n ranks moves (n - 1) / n of the bytes",
    ),
    Mutant(
        "planner-casts-fp8-weights-every-microbatch",
        "megapre/planner/speed.py",
        "(weights + shape.mlp_weights(moe) / split) / layout.microbatches",
        "(weights + shape.mlp_weights(moe) / split)",
        "tests/planner/test_timing.py::test_fp8_casts_its_weights_once_a_step",
        "fp8 weights and their transposes are kept for the step: large experts were predicted twice too slow",
    ),
    Mutant(
        "planner-recomputes-row-by-row",
        "benchmarks/planner/rows.py",
        "return one_policy(runs), rest",
        "return runs, rest",
        "tests/planner/test_published.py::test_runs_of_one_recipe_recompute_alike",
        "one recipe at 64 and 1024 GPUs was read as full and as selective recomputation: four runs 30% too fast",
    ),
    Mutant(
        "planner-forgets-the-last-stages-head",
        "megapre/planner/memory.py",
        "dense += shape.norm + own",
        "dense += shape.norm",
        "tests/planner/test_memory.py::test_elements_are_those_of_the_spec",
        "simulators that leave out the vocabulary were off by 37%",
    ),
    Mutant(
        "planner-counts-one-microbatch-in-flight",
        "megapre/planner/memory.py",
        "            live += keeps[action.stage]\n",
        "            live = keeps[action.stage]\n",
        "tests/planner/test_memory.py::test_stages_hold_what_is_in_flight",
        "1F1B holds p - r microbatches on rank r",
    ),
)
