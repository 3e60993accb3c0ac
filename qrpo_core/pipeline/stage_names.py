"""What each stage is called, in the order in which the stages run: in terminal, UI, plan and documents.

The flows run STAGES in this order, by the functions that docs/code-tour.md lists; a test compares a run with
it. Later rounds, judges and benchmarks add stages of their own.
"""

from __future__ import annotations

import re

CONVERT_MODEL = "convert model"
PREPARE_PROMPTS = "prepare prompts"
CHECK_ROWS = "check rows"
SAMPLE_REFERENCES = "sample references"
ANNOTATE_REFERENCES = "annotate references"
ANNOTATE_OFFLINE = "annotate offline completions"
#: Of later rounds, whose completions are the current policy's.
SAMPLE_COMPLETIONS, ANNOTATE_COMPLETIONS = "sample completions", "annotate completions"
COMPUTE_QUANTILES = "compute quantiles"
SCORE_REFERENCE_LOGPROBS = "score reference log-probs"
#: Of the data set's completions, where samples are trained on beside them.
SCORE_OFFLINE_LOGPROBS = "score reference log-probs, offline"
ASSEMBLE_TRAINING_SET = "assemble training set"
TRAIN_POLICY = "train policy"
SAMPLE_HELD_OUT, ANNOTATE_HELD_OUT = "sample held-out", "annotate held-out"
SCORE_POLICY_LOGPROBS = "score policy log-probs"
EVALUATE_POLICY = "evaluate policy"
#: Of each benchmark of the evaluation, with its name and, for rows, the side: see `of_benchmark`.
PREPARE_BENCHMARK, CHECK_BENCHMARK = "prepare benchmark", "check benchmark"
SAMPLE_BENCHMARK, ANNOTATE_BENCHMARK = "sample benchmark", "annotate benchmark"
EVALUATE_BENCHMARK = "evaluate benchmark"
WRITE_REPORT = "write report"
#: Of a comparison of several trained policies.
COMPARE_POLICIES = "compare policies"
#: Of `qrpo pool`, which no run needs.
WRITE_POOL_REPORT = "write pool report"

#: The stages of one round of training and its evaluation. An experiment has those that its settings need.
STAGES = (
    CONVERT_MODEL,
    PREPARE_PROMPTS,
    CHECK_ROWS,
    SAMPLE_REFERENCES,
    ANNOTATE_REFERENCES,
    ANNOTATE_OFFLINE,
    COMPUTE_QUANTILES,
    SCORE_REFERENCE_LOGPROBS,
    SCORE_OFFLINE_LOGPROBS,
    ASSEMBLE_TRAINING_SET,
    TRAIN_POLICY,
    f"{SAMPLE_HELD_OUT}, before",
    f"{ANNOTATE_HELD_OUT}, before",
    f"{SAMPLE_HELD_OUT}, after",
    f"{ANNOTATE_HELD_OUT}, after",
    f"{SCORE_POLICY_LOGPROBS}, after",
    f"{SCORE_REFERENCE_LOGPROBS}, after",
    EVALUATE_POLICY,
    WRITE_REPORT,
)


def in_round(stage: str, number: int) -> str:
    """The name of a stage in a round of training: the first has the plain name."""
    return stage if number == 1 else f"{stage}, round {number}"


def of_judge(name: str, when: str) -> str:
    """The name of the stage in which a judge of the evaluation scores held-out completions."""
    return f"judge {name} held-out, {when}"


def of_pool_judge(name: str) -> str:
    """The name of the stage in which a judge of the evaluation scores completions of the pool."""
    return f"judge {name}, pool"


def of_benchmark(stage: str, name: str, when: str = "") -> str:
    """The name of a benchmark's stage. when : "before" or "after" training, for its rows."""
    return f"{stage} {name}" + (f", {when}" if when else "")


def benchmark_in(stage: str) -> str | None:
    """The benchmark whose rows a stage computes; None for other stages."""
    found = re.fullmatch(rf"({SAMPLE_BENCHMARK}|{ANNOTATE_BENCHMARK}) (\S+), (before|after)", stage)
    return None if found is None else found[2]
