"""Benchmarks without a server: their prompts, what their recipes hold, and how their results are counted."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.config import EvaluationConfig
from qrpo_core.config.benchmarks import GREEDY_TOP_P, BenchmarkConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.engines.kinds import KINDS
from qrpo_core.evaluation.benchmarks import BenchmarkResult, evaluate_benchmark
from qrpo_core.evaluation.inputs import EVALUATED
from qrpo_core.inspection.memory import stage_memory
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.stage_plan import StagePlan
from qrpo_core.pipeline import alpaca_eval, benchmarks, prompts
from qrpo_core.pipeline.experiment_steps import stored_reference
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.reporting.benchmarks import benchmark_rows
from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.registry import make_reward
from tests.core.rewards.alpaca_judge import write_baseline
from tests.core.rewards.code_problems import needs_bwrap
from tests.core.small_experiment import changed, fill

LEETCODE = Path(__file__).resolve().parents[4] / "shared/data/leetcode/LeetCodeDataset-v0.2.0-test.jsonl.gz"

FAST = EvaluationConfig(resamples=100)
Rewards = Mapping[str, list[float | None]]


def rows(rewards: Rewards) -> pa.Table:
    found = [
        {
            "prompt_id": prompt,
            "sample_index": index,
            "text": "t",
            "num_tokens": 3,
            "finish_reason": "stop",
            "reward": value,
            "status": "ok" if value is not None else "timeout",
        }
        for prompt, values in rewards.items()
        for index, value in enumerate(values)
    ]
    return pa.Table.from_pylist(found, schema=EVALUATED)


def evaluated(before: Rewards, after: Rewards, kind: str = "code") -> BenchmarkResult:
    return evaluate_benchmark(rows(before), rows(after), FAST, name="b", kind=kind)


def test_shares_of_tests_and_of_solved_problems_by_hand() -> None:
    result = evaluated({"a": [0.5], "b": [1.0], "c": [None]}, {"a": [1.0], "b": [0.75], "c": [1.0]})
    assert (result.prompts, result.left_out) == (2, {"before": 1, "after": 0, "both": 0})
    assert (result.before.reward.value, result.after.reward.value) == (0.75, 0.875)
    assert result.difference.value == 0.125
    assert result.solved_before is not None
    assert result.solved_after is not None
    assert (result.solved_before.value, result.solved_after.value) == (0.5, 0.5)
    assert result.before.not_ok["timeout"] == 1
    assert BenchmarkResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    shown = dict(benchmark_rows({"b": result}))
    assert shown["b: Completions without a reward"] == "1 of 3 (1 timeout) → 0 of 3"
    assert "0.5" in shown["b: Solved, share with the full reward"]


#: Shares of up to 7 tests, as the code reward computes them; None for a row without a reward.
SHARES = st.one_of(
    st.none(), st.integers(1, 7).flatmap(lambda n: st.integers(0, n).map(lambda passed: passed / n))
)


@trials(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(SHARES, min_size=1, max_size=3), st.data()), min_size=1, max_size=6).flatmap(
        lambda prompts: st.tuples(
            st.just([values for values, _ in prompts]),
            st.tuples(*(st.lists(SHARES, min_size=len(v), max_size=len(v)) for v, _ in prompts)),
        )
    )
)
def test_the_counts_are_those_of_a_loop(drawn: tuple[list[Any], tuple[Any, ...]]) -> None:
    before = {f"p{place}": list(values) for place, values in enumerate(drawn[0])}
    after = {f"p{place}": list(values) for place, values in enumerate(drawn[1])}

    def means(side: Rewards, of: Any) -> dict[str, float]:
        kept = {name: [of(v) for v in values if v is not None] for name, values in side.items()}
        return {name: sum(values) / len(values) for name, values in kept.items() if values}

    compared = means(before, float).keys() & means(after, float).keys()
    if not compared:
        with pytest.raises(DataError, match="none of"):
            evaluated(before, after)
        return
    result = evaluated(before, after)
    assert result.prompts == len(compared)
    assert result.prompts + sum(result.left_out.values()) == len(before)
    for side, rewards, solved in (
        (before, result.before, result.solved_before),
        (after, result.after, result.solved_after),
    ):
        count = len(compared)
        assert solved is not None
        assert rewards.reward.value == pytest.approx(sum(means(side, float)[p] for p in compared) / count)
        full = means(side, lambda share: float(share == 1))
        assert solved.value == pytest.approx(sum(full[p] for p in compared) / count)
        assert solved.value <= rewards.reward.value + 1e-12, "a solved problem passes all of its tests"
        assert rewards.not_ok["timeout"] == sum(v is None for values in side.values() for v in values)


def test_other_rewards_have_no_share_of_solved() -> None:
    assert evaluated({"a": [0.5]}, {"a": [1.0]}, kind="model").solved_after is None


def test_outputs_are_in_the_order_of_the_file_and_beside_the_baseline(tmp_path: Path) -> None:
    written = write_baseline(tmp_path / "baseline.json", 5)
    table = prompts.read(Workspace(alpaca_experiment(tmp_path, tmp_path)).benchmark("alpaca")).prompts
    ids = table["prompt_id"].to_pylist()
    completions = rows({name: [None if name == ids[2] else 0.25] for name in sorted(ids)})
    found = alpaca_eval.outputs(table, completions, "us")
    assert [row["instruction"] for row in found.rows] == [row["instruction"] for row in written]
    assert {row["generator"] for row in found.rows} == {"us"}
    assert {row["dataset"] for row in found.rows} == {"made"}
    assert [pair["output_1"] for pair in found.pairs] == [row["output"] for row in written]
    assert [pair["preference"] for pair in found.pairs] == [1.25, 1.25, None, 1.25, 1.25]
    assert [pair["index"] for pair in found.pairs] == [0, 1, 2, 3, 4]


def alpaca_experiment(folder: Path, model: Path) -> Any:
    benchmark = {
        "prompts": {
            "kind": "file",
            "path": str(folder / "baseline.json"),
            "prompt_field": "instruction",
            "ground_truth_fields": ["output", "generator", "dataset"],
        },
        "reward": {"kind": "alpaca_eval", "alpaca_eval": {"url": "http://127.0.0.1:9/v1"}},
    }
    return parse_experiment(
        {
            "model": {"path": str(model)},
            "prompts": {"kind": "template", "templates": ["a {x}"], "words": {"x": ["1", "2"]}, "size": 2},
            "reward": {"kind": "length", "max_words": 1},
            "evaluation": {"benchmarks": {"alpaca": benchmark}},
            "store": {"path": str(folder / "store")},
        }
    )


def numbers(path: Path, **fields: Any) -> dict[str, Any]:
    own = {"kind": "file", "path": str(path), "prompt_field": "question", "ground_truth_field": "answer"}
    return {"prompts": own, "reward": {"kind": "number"}, **fields}


def test_a_benchmark_has_its_own_prompts_and_sampling_and_shares_store_and_engine(
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    write(tmp_path / "own.jsonl", [{"question": f"Count {n}", "answer": n} for n in range(4)])
    plain = Workspace(changed(settings))
    greedy = numbers(tmp_path / "own.jsonl", max_new_tokens=7)
    hot = greedy | {"temperature": 0.5, "samples_per_prompt": 3}
    wanted = changed(settings, evaluation={"benchmarks": {"greedy": greedy, "hot": hot}})
    workspace = Workspace(wanted)
    check(workspace)
    reference = stored_reference(workspace)
    one, two = benchmarks.benchmarks(workspace, reference)
    assert len(one.before.samples.wanted) == 4
    assert set(one.tables.prompts["split"].to_pylist()) == {"held_out"}
    assert fill(workspace, one.before.samples) == 4
    assert fill(workspace, two.before.samples) == 12
    mine, shared = (
        each.engine(reference.directory, kind=KINDS["fake"]) for each in (one.workspace, workspace)
    )
    assert mine is shared
    drawn = one.before.samples.read([(key, 0) for key in one.before.samples.wanted])
    assert max(map(len, drawn["token_ids"].to_pylist())) <= 7
    sampling = one.workspace.experiment.sampling
    assert (sampling.temperature, sampling.top_p) == (1.0, GREEDY_TOP_P)
    assert prompts.recipe(one.workspace) == prompts.recipe(two.workspace)
    assert one.before.samples.recipe != two.before.samples.recipe
    # the experiment's own results do not depend on its benchmarks
    assert prompts.recipe(plain) == prompts.recipe(workspace)


def test_temperature_0_takes_the_most_probable_token_whatever_the_seed(
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    write(tmp_path / "own.jsonl", [{"question": f"Count {n}", "answer": n} for n in range(6)])
    texts = []
    for seed in (0, 1):
        own = {"own": numbers(tmp_path / "own.jsonl")}
        sampling = {"engine": "transformers", "seed": seed}
        workspace = Workspace(changed(settings, evaluation={"benchmarks": own}, sampling=sampling))
        (found,) = benchmarks.benchmarks(workspace, stored_reference(workspace))
        step = found.before.samples
        fill(workspace, step)
        texts.append(step.read([(key, 0) for key in sorted(step.wanted)])["token_ids"].to_pylist())
    assert texts[0] == texts[1]


def test_the_plan_and_its_memory_have_the_stages_of_a_benchmark(
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    write(tmp_path / "own.jsonl", [{"question": f"Count {n}", "answer": n} for n in range(4)])
    own = {"own": numbers(tmp_path / "own.jsonl", max_new_tokens=120)}
    sampling = {"engine": "transformers"}
    workspace = Workspace(changed(settings, evaluation={"benchmarks": own}, sampling=sampling))
    stages = [stage for stage in plan(workspace) if "benchmark" in stage.stage]
    rows = {"sample benchmark own": 4, "annotate benchmark own": 4}
    assert {stage.stage: stage.missing for stage in stages} == {
        "prepare benchmark own": 1,
        "check benchmark own": 1,
        **{f"{name}, {when}": count for name, count in rows.items() for when in ("before", "after")},
        "evaluate benchmark own": 1,
    }
    (shorter,) = stage_memory(workspace, [StagePlan("sample held-out, before", 0, 1, "")], None)
    (longer,) = stage_memory(workspace, [StagePlan("sample benchmark own, before", 0, 1, "")], None)
    cache = "cache of a row"
    assert longer.parts[cache] == 10 * shorter.parts[cache], "12 tokens there, 120 here"


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def test_bad_rows_are_all_named_before_anything_is_computed(
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    good = [{"question": f"Count {n}", "answer": n} for n in range(3)]
    write(tmp_path / "own.jsonl", [*good, {"question": 3, "answer": 1}, {"answer": 1}])
    own = {"own": numbers(tmp_path / "own.jsonl")}
    with pytest.raises(DataError) as found:
        check(Workspace(changed(settings, evaluation={"benchmarks": own})))
    assert str(found.value).startswith("evaluation.benchmarks.own: 2 rows cannot be used")
    assert ":4" in str(found.value)
    assert ":5" in str(found.value)
    refused = [{"question": "Count", "answer": None}, {"question": "q", "answer": "x"}]
    write(tmp_path / "own.jsonl", [*good, *refused])
    with pytest.raises(DataError) as found:
        check(Workspace(changed(settings, evaluation={"benchmarks": own})))
    assert ":4" in str(found.value)
    assert ":5" in str(found.value)


def test_a_data_set_of_the_hub_is_read_like_a_file(
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "alpaca_eval"
    folder.mkdir()
    write(folder / "test.jsonl", [{"question": f"Count {n}", "answer": n} for n in range(4)])
    hub = numbers(tmp_path / "x")
    hub["prompts"] = {
        **{key: value for key, value in hub["prompts"].items() if key != "path"},
        "kind": "hub",
        "name": str(folder),
        "split": "test",
    }
    workspace = Workspace(changed(settings, evaluation={"benchmarks": {"own": hub}}))
    (found,) = benchmarks.benchmarks(workspace, stored_reference(workspace))
    assert len(found.tables.prompts) == 4


@needs_bwrap
def test_real_problems_are_read_and_their_own_solutions_solve_them(settings: dict[str, Any]) -> None:
    """The file has 15 pairs of problems (I and II) with one text; tests or setups of nine of them differ."""
    if not LEETCODE.is_file():
        pytest.skip(f"../shared/data/leetcode/{LEETCODE.name} is absent")
    own = {
        "prompts": {
            "kind": "file",
            "path": str(LEETCODE),
            "prompt_field": "query",
            "ground_truth_fields": ["prompt", "entry_point", "test"],
            "on_unusable": "skip",
        },
        "reward": {"kind": "code", "code": {"format": "leetcode"}},
    }
    workspace = Workspace(changed(settings, evaluation={"benchmarks": {"leetcode": own}})).benchmark(
        "leetcode"
    )
    found = prompts.read(workspace)
    counts = {name: found.counts[name] for name in ("prompts", "merged", "contradicting_rows")}
    assert counts == {"prompts": 185, "merged": 6, "contradicting_rows": 9}
    with gzip.open(LEETCODE, "rt", encoding="utf-8") as lines:
        solutions = {row["query"]: row["completion"] for row in reversed([*map(json.loads, lines)])}
    tried = found.prompts.to_pylist()[::25]
    sides: dict[str, dict[str, list[float | None]]] = {"before": {}, "after": {}}
    with contextlib.closing(make_reward(workspace.experiment.reward)) as reward:
        for side, answers in sides.items():
            texts = [
                solutions[row["messages"][-1]["content"]] if side == "after" else "pass" for row in tried
            ]
            asked = [
                RewardRequest(row["prompt_id"], 0, (), f"```python\n{text}\n```", row["ground_truth"])
                for row, text in zip(tried, texts, strict=True)
            ]
            answers |= {
                one.prompt_id: [two.reward] for one, two in zip(asked, reward.score(asked), strict=True)
            }
    result = evaluated(sides["before"], sides["after"])
    assert result.solved_before is not None
    assert result.solved_after is not None
    assert (result.solved_before.value, result.solved_after.value) == (0.0, 1.0)
    assert result.difference.value == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 2}, "temperature 0 gives one completion"),
        ({"top_p": 0.9}, "temperature 0 gives one completion"),
        ({"length_controlled": False}, "belongs to reward.kind alpaca_eval"),
        ({"prompts": {"kind": "file", "path": "x", "held_out": 0.5}}, "held_out"),
        ({"prompts": {"kind": "file", "path": "x", "chosen_field": "c", "rejected_field": "r"}}, "remove it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig.model_validate({**numbers(Path("x")), **changes})


def test_a_name_with_a_space_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="benchmarks"):
        changed(settings, evaluation={"benchmarks": {"two words": numbers(Path("x"))}})
