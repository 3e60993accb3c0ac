"""What a stage costs, and that a price is in no recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qrpo_core.config import Experiment
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.stage_work import counts_rows, work_of
from qrpo_core.pipeline import policies, prompts
from qrpo_core.pipeline.experiment_steps import ExperimentSteps
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.workspace import Workspace
from tasks.cost import Meter, meter
from tasks.progress import progress_text
from tasks.stages import Stage
from tasks.ui_artifacts import stage_rows
from tests.flows.small import small

PRICE = {"gpu_hour_price": 3.6, "currency": "EUR"}  # a thousandth of a euro a second


def experiment(**sections: Any) -> Experiment:
    return parse_experiment({"name": "small"} | small(Path("model"), Path("store")) | sections)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {},
            {
                "sample references": 0,
                "score reference log-probs": 1,
                "train policy": 1,
                "annotate references": 0,
            },
        ),
        (
            {"sampling": {"engine": "transformers"}},
            {"sample completions, round 2": 1, "parity, sample references": 1},
        ),
        (
            {"sampling": {"engine": "vllm"}, "vllm": {"tensor_parallel_size": 2, "engines": 4}},
            {"sample held-out, after": 8, "parity, sample references": 8, "score reference log-probs": 1},
        ),
        (
            {"sampling": {"engine": "endpoint"}, "endpoint": {"url": "http://127.0.0.1:1/v1"}},
            {"sample references": 0, "parity, sample references": 1},
        ),
        (
            {
                "sampling": {"engine": "transformers"},
                "evaluation": {
                    "benchmarks": {
                        "own": {
                            "prompts": {"kind": "file", "path": "own.jsonl"},
                            "reward": {"kind": "model", "model": {"path": "judge"}},
                        }
                    }
                },
            },
            {
                "annotate held-out, after": 0,
                "sample benchmark own, before": 1,
                "annotate benchmark own, after": 1,
                "evaluate benchmark own": 0,
            },
        ),
        (
            {"training": {"processes": 4}},
            {"train policy": 4, "train policy, round 2": 4, "assemble training set": 0},
        ),
        (
            {
                "reward": {
                    "kind": "weighted",
                    "terms": [{"weight": 1, "reward": {"kind": "model", "model": {"path": "m"}}}],
                },
                "evaluation": {"judges": {"a b": {"kind": "length", "max_words": 1}}},
            },
            {"annotate references": 1, "annotate completions, round 2": 1, "judge a b held-out, after": 0},
        ),
        (
            {"evaluation": {"judges": {"a b": {"kind": "model", "model": {"path": "m"}}}}},
            {"judge a b held-out, before": 1, "annotate held-out, before": 0},
        ),
        (
            {},
            dict.fromkeys(
                ("convert model", "prompts", "quantiles", "assemble training set", "evaluate", "report"), 0
            ),
        ),
    ],
)
def test_gpus_of_a_stage(
    sections: dict[str, Any], expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    asked = experiment(**sections)
    assert {stage: work_of(asked, stage).gpus for stage in expected} == expected


def test_vllm_takes_every_visible_gpu_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    asked = experiment(sampling={"engine": "vllm"}, vllm={"tensor_parallel_size": 2})
    assert work_of(asked, "sample references").gpus == 4  # two engines; the fifth holds none
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # too few: the engine says so when it starts
    assert work_of(asked, "sample references").gpus == 2


def test_no_price_no_cost() -> None:
    assert meter(experiment(), "train policy") is None
    assert meter(None, "train policy") is None
    free = meter(experiment(service={"gpu_hour_price": 0}), "train policy", machines=3)
    assert free == Meter(3, 0.0, None)
    assert free.text(free.cost(100)) == "0.00"


@pytest.mark.parametrize(
    ("done", "seconds", "text"),
    [
        (0, 0.0, "s: 0 of 300 rows"),
        (120, 48.0, "s: 120 of 300 rows, 2.5 rows/s, 1 min 12 s left, 0.10 EUR so far of about 0.24 EUR"),
        (300, 2000.0, "s: 300 of 300 rows, 0.15 rows/s in 33 min 20 s, 4.00 EUR"),
    ],
)
def test_progress_says_rate_time_and_cost(done: int, seconds: float, text: str) -> None:
    costs = Meter(2, 3.6, "EUR")
    assert progress_text("s", done, 300, "rows", seconds, costs) == text
    without = progress_text("s", done, 300, "rows", seconds, None)
    assert without == text.partition(", 0.10")[0].partition(", 4.00")[0]
    assert progress_text("s", done, 300, "rows", seconds, Meter(0, 3.6, "EUR")) == without


STAGES = [
    Stage("prepare prompts", 0, 1, "Completed", 2.0),
    Stage("sample references", 20, 40, "Completed", 100.0),
    Stage("score reference log-probs", 60, 0, "Cached", 0.5),
    Stage("train policy", 0, 1, "Completed", 1000.0),
]


def test_the_table_of_stages() -> None:
    rows = stage_rows(STAGES, experiment(sampling={"engine": "transformers"}, service=PRICE))
    assert [row["rows/s"] for row in rows] == ["", "", 0.4, "", ""]
    assert [row["GPUs"] for row in rows] == ["", 0, 1, 1, 1]
    assert [row["cost, EUR"] for row in rows] == ["1.10", "", "0.10", "0.00", "1.00"]
    assert rows[2]["reused"] == 20
    assert (rows[0]["stage"], rows[0]["seconds"]) == ("all of this run", 1102.5)
    assert all(row.keys() == rows[0].keys() for row in rows)
    plain = stage_rows(STAGES, experiment())
    assert len(plain) == len(STAGES)
    assert list(plain[0]) == ["stage", "reused", "computed", "seconds", "rows/s", "state"]
    assert stage_rows([], experiment(service=PRICE)) == []


def test_rows_that_other_runs_computed_cost_there() -> None:
    asked = experiment(sampling={"engine": "transformers"}, service=PRICE)
    held_out = Stage("sample held-out, before", 0, 8, "Completed", 100.0)
    rows = stage_rows([*STAGES, held_out], asked, elsewhere=True)
    costs = [row["cost, EUR"] for row in rows]
    assert costs == ["1.10", "", "with its shards", "0.00", "1.00", "0.10"]


def recipes(asked: Experiment) -> list[str]:
    workspace = Workspace(asked)
    wanted = prompts.recipe(workspace)
    reference = policies.reference(workspace, policies.source_of(workspace))
    assert isinstance(reference, Policy)
    known = ExperimentSteps.of(workspace, reference, wanted, prompts.find(workspace, wanted))
    *_, last = known.planned_rounds()
    steps = (*last.row_steps, last.logprobs, *known.before)
    return [
        wanted.path,
        *(step.recipe.path for step in steps),
        last.quantiles_recipe.path,
        last.training_set_recipe.path,
        last.train_recipe.path,
    ]


def test_a_price_is_in_no_recipe_and_every_stage_of_a_plan_is_known(tiny_model: Path, tmp_path: Path) -> None:
    settings = small(tiny_model, tmp_path / "store")
    plain, priced = (
        parse_experiment({"name": "small"} | settings | more) for more in ({}, {"service": PRICE})
    )
    assert recipes(plain) == recipes(priced)
    warm = parse_experiment(
        {"name": "small"} | settings | {"sampling": {"engine": "fake", "temperature": 0.5}}
    )
    assert len(recipes(plain)) == 9
    assert set(recipes(plain)) & set(recipes(warm)) == {recipes(plain)[0]}  # the prompts
    stages = {stage.stage: stage.missing for stage in plan(Workspace(priced))}
    assert {stage for stage in stages if counts_rows(stage)} == {s for s, rows in stages.items() if rows > 1}
