"""The expected times of a plan: known rates are their files, sums add up, and sources come in order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.formatting import duration
from qrpo_core.config.reading import load_experiment
from qrpo_core.inspection.expected import Estimator, Speed, total, with_expected
from qrpo_core.inspection.known_rates import ARTIFACT_SECONDS, KNOWN, LLAMA_1B, LLAMA_8B, SMOLLM_135M, rate_of
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.plan_text import plan_lines
from qrpo_core.inspection.price import Price
from qrpo_core.inspection.probe import Block, fitted, probe
from qrpo_core.inspection.rates import ProbedRate, read_rate
from qrpo_core.inspection.stage_plan import Expected, StagePlan
from qrpo_core.models.source import without_weights
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed, fill, precompute, settings

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
__all__ = ["settings"]


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return found


def stages_of_demo() -> dict[str, tuple[int, float]]:
    """Rows or artifacts of each stage of the demo, and seconds."""
    found = {}
    for line in result("demo.json")["run"]["stages"]:
        ((name, count, seconds),) = re.findall(r"  (.+?) +([\d,]+) [^(]+\(([\d.]+) s\)", line)
        found[name] = (int(count.replace(",", "")), float(seconds))
    return found


def test_seconds_of_artifacts_are_those_of_the_demo() -> None:
    stages = stages_of_demo()
    assert {name: stages[name][1] for name in ARTIFACT_SECONDS} == dict(ARTIFACT_SECONDS)


def test_known_rates_are_those_of_the_result_files() -> None:
    h100, cpu = KNOWN["h100"].rates, KNOWN["cpu"].rates
    file = result("h100.json")
    sampled = file["sampling_vllm"]["tokens_per_second"]
    scored = file["log_probs"]
    scored_here = result("reference_logprobs.json")
    rows, seconds = stages_of_demo()["sample references"]
    scored_rows, scored_seconds = stages_of_demo()["annotate references"]
    (length,) = (line for line in result("demo.json")["run"]["lines"] if line.startswith("Mean length"))
    drawn = float(length.split("tokens")[1].split()[0])
    expected = {
        "sample vllm": sum(sampled) / len(sampled),
        "sample transformers": file["sampling_transformers"]["tokens_per_second"],
        "log-probs": scored["rows_per_second"] * scored["tokens"] / scored["rows"],
        "train": file["training"]["tokens_per_second"],
    }
    assert {name: h100[name][0].rate for name in expected} == pytest.approx(expected, rel=1e-3)
    here = {
        "sample vllm": result("vllm_sampling.json")["tokens_per_second"]["ours"][0],
        "sample transformers": rows * drawn / seconds,
        "log-probs": scored_here["rows_per_second"]["ours"] * scored_here["tokens"] / scored_here["rows"],
        "train": result("training_vs_trl.json")["runs"]["ours_qrpo"]["tokens_per_second"],
        "reward sentiment": scored_rows / scored_seconds,
        "reward code": result("code_reward.json")["mbpp"]["rows_per_second"],
    }
    assert {name: cpu[name][0].rate for name in here} == pytest.approx(here, rel=1e-3)


@given(st.floats(1e7, 1e12), st.floats(1.0, 10.0))
def test_a_larger_model_is_never_faster(parameters: float, times: float) -> None:
    for device in KNOWN.values():
        for work in device.rates:
            small, large = (rate_of(device, work, int(each)) for each in (parameters, parameters * times))
            assert small is not None
            assert large is not None
            assert large.rate <= small.rate * (1 + 1e-9)


def test_rates_at_the_sizes_that_were_measured_and_beyond() -> None:
    device = KNOWN["h100"]
    for size, rate in ((SMOLLM_135M, 11_787.0), (LLAMA_8B, 7_746.0), (2 * LLAMA_8B, 3_873.0)):
        found = rate_of(device, "sample vllm", size)
        assert found is not None
        assert found.rate == pytest.approx(rate, rel=1e-3)
    trained = rate_of(device, "train", 2 * LLAMA_1B)
    assert trained is not None
    assert trained.rate == pytest.approx(10_503.3 / 2)


SECONDS = st.floats(0, 1e7)
STAGES = st.lists(
    st.builds(
        lambda seconds, factor, gpus, known: StagePlan(
            "s",
            0,
            1,
            "",
            expected=Expected(seconds, seconds / factor, seconds * factor, "", gpus) if known else None,
        ),
        SECONDS,
        st.floats(1, 4),
        st.integers(0, 16),
        st.booleans(),
    ),
    max_size=20,
)


@given(STAGES)
def test_totals_are_the_sums_of_the_stages(stages: list[StagePlan]) -> None:
    found = total(stages)
    known = [each.expected for each in stages if each.expected is not None]
    assert found.unknown == len(stages) - len(known)
    assert found.seconds[0] == pytest.approx(sum(each.seconds for each in known))
    assert found.gpu_hours[0] == pytest.approx(sum(each.gpus * each.seconds for each in known) / 3600)
    for about, low, high in (found.seconds, found.gpu_hours):
        assert low <= about * (1 + 1e-9)
        assert about <= high * (1 + 1e-9)


def test_a_probe_measures_what_the_plan_then_says_and_wastes_no_row(settings: dict[str, Any]) -> None:
    asked = changed(settings, sampling={"engine": "transformers"}, store={"rows_per_block": 64})
    workspace = Workspace(asked)
    probe(workspace, lambda rows: None)
    workspace.close()
    keys = list(workspace.objects.keys("rates/"))
    assert sorted(key.split("/")[1] for key in keys) == [
        *("log-probs",) * len([k for k in keys if "/log-probs/" in k]),
        "reward",
        "sample",
        "train",
    ]
    rates = {key.split("/")[1]: read_rate(workspace.objects, key) for key in keys}
    assert all(isinstance(rate, ProbedRate) and rate.row > 0 for rate in rates.values())
    fresh = Workspace(asked)
    stages = {each.stage: each for each in with_expected(fresh, plan(fresh))}
    drawn = stages["sample references"]
    assert (drawn.present, drawn.missing) == (27, 0)  # every reference fits into a probe
    train = stages["train policy"].expected
    rate = rates["train"]
    assert train is not None
    assert rate is not None
    assert train.source.startswith("probe of ")
    assert train.seconds == pytest.approx(rate.startup + 27 * rate.row)
    after = stages["sample held-out, after"].expected
    assert after is not None
    assert after.source.startswith("probe of ")
    assert "unknown time" not in "\n".join(plan_lines(list(stages.values()), "store"))


TIMES = st.floats(1e-4, 10.0)


@given(TIMES, TIMES, st.floats(0, 100), st.integers(2, 64), st.integers(1, 20), st.integers(16, 128))
def test_a_probe_tells_the_time_of_a_prompt_from_that_of_a_row(
    row: float, prompt: float, startup: float, each: int, prompts: int, alone: int
) -> None:
    def block(rows: int, prompts: int, before: float = 0.0) -> Block:
        return Block(rows, prompts, before + rows * row + prompts * prompt, None)

    first, deep, wide = block(8, 1, startup), block(each * prompts, prompts), block(alone, alone)
    found = fitted(first, deep, wide)
    assert (found.row, found.prompt) == pytest.approx((row, prompt), rel=1e-6, abs=1e-9)
    assert found.startup == pytest.approx(startup, rel=1e-6, abs=1e-6)
    whole = fitted(first, deep, None)  # without the block of prompts, a row takes its part of a prompt
    assert (whole.row, whole.prompt) == pytest.approx((row + prompt / each, 0.0))


def test_the_time_of_a_stage_counts_its_prompts() -> None:
    speed = Speed(startup=5.0, row=0.1, source="", factor=1.5, prompt=2.0)
    assert speed.seconds(rows=294, rows_per_prompt=2.0) == pytest.approx(5 + 294 * 0.1 + 147 * 2)


def test_a_probe_draws_one_row_of_many_prompts(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short its time is: the first rows, then a row of each of 16 prompts, which are not those."""
    monkeypatch.setattr(
        "qrpo_core.inspection.probe.SECONDS", dict.fromkeys(("sample", "reward", "log-probs"), 0.0)
    )
    words = {"n": [f"item {number}" for number in range(60)]}
    many = {"kind": "template", "templates": ["Say {n}"], "words": words, "size": 60, "held_out": 0.1}
    asked = changed(settings | {"prompts": many, "reward": {"kind": "length", "max_words": 1}})
    workspace = Workspace(asked)
    probe(workspace, lambda rows: None)
    (recipe,) = (each for each in workspace.blocks.all_recipes() if each.step == "sample")
    blocks = [[each.count for each in block.ranges] for block in workspace.blocks.committed(recipe)]
    assert sorted(map(len, blocks)) == [3, 16]
    assert sorted(map(sum, blocks)) == [8, 16]


@given(TIMES, TIMES)
def test_a_probe_never_finds_negative_times(deep: float, wide: float) -> None:
    found = fitted(Block(8, 1, 1.0, None), Block(120, 10, deep, None), Block(64, 64, wide, None))
    assert min(found.row, found.prompt, found.startup) >= 0
    assert 120 * found.row + 10 * found.prompt == pytest.approx(deep)


def test_a_rate_of_the_store_speaks_for_stages_with_as_many_rows_a_prompt(settings: dict[str, Any]) -> None:
    estimator = Estimator(
        Workspace(changed(settings)),
        [
            StagePlan("sample references", 9, 0, "", rate=1.0, rows_per_prompt=9.0),
            StagePlan("sample held-out, before", 2, 0, "", rate=0.5, rows_per_prompt=2.0),
            after := StagePlan("sample held-out, after", 0, 2, "", rows_per_prompt=2.0),
            many := StagePlan("sample references, round 2", 0, 8, "", rows_per_prompt=8.0),
        ],
        None,
        KNOWN["cpu"],
        10.0,
    )
    found = {each.stage: each.expected for each in estimator.estimated()}
    for stage, source in ((after, "sample held-out, before"), (many, "sample references")):
        expected = found[stage.stage]
        assert expected is not None
        assert expected.source == f"this store ({source})"


def test_the_store_is_asked_before_a_known_device(settings: dict[str, Any]) -> None:
    asked = changed(settings)
    steps, _ = precompute(asked)
    workspace = Workspace(asked)
    fill(workspace, steps.before.samples)
    stages = {each.stage: each for each in with_expected(workspace, plan(workspace), KNOWN["h100"])}
    after = stages["sample held-out, after"]
    assert after.expected is not None
    assert after.expected.source.startswith("this store")
    assert after.expected.seconds == pytest.approx(
        after.missing / (stages["sample held-out, before"].rate or 1)
    )
    assert after.expected.low < after.expected.seconds < after.expected.high


def test_a_plan_needs_the_config_of_a_model_only(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    whole = Path(settings["model"]["path"])
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    engine = {"engine": "vllm", "references_per_prompt": 3, "max_new_tokens": 12}
    asked = changed(settings, model={"path": str(folder)}, sampling=engine)
    with without_weights():
        workspace = Workspace(asked)
        check(workspace, runs=False)
        stages = with_expected(workspace, plan(workspace), KNOWN["h100"])
    text = "\n".join(plan_lines(stages, "store", Price(2.0, "EUR")))
    assert "known rate of H100" in text
    assert "GPU hours" in text
    assert " EUR (" in text


@pytest.mark.parametrize(
    ("stage", "sections", "why"),
    [
        ("sample references", {"sampling": {"temperature": 0.5}}, "sampling.temperature changed"),
        ("annotate references", {"reward": {"kind": "length", "max_words": 2}}, "reward.max_words changed"),
        ("train policy", {"training": {"learning_rate": 1e-3}}, "training.learning_rate changed"),
        ("train policy", {"objective": {"beta": 0.5}}, "objective.beta changed"),
    ],
)
def test_reasons_are_the_settings_of_the_file(
    settings: dict[str, Any], stage: str, sections: dict[str, Any], why: str
) -> None:
    steps, _ = precompute(changed(settings))
    recipe = steps.first.train_recipe
    steps.workspace.artifacts.commit(recipe, {"policy/x": b"x"}, {"rows": 1}, 1.0)
    stages = {each.stage: each.why for each in plan(Workspace(changed(settings, **sections)))}
    assert stages[stage] == why


def test_reasons_name_the_files_that_changed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scorer = tmp_path / "my_rewards.py"
    scorer.write_text("def score(batch):\n    return [float(len(row.completion)) for row in batch]\n")
    reward = {"kind": "python", "python": {"function": "my_rewards.py:score"}}
    asked = changed(settings | {"reward": reward})
    precompute(asked)
    scorer.write_text("def score(batch):\n    return [-float(len(row.completion)) for row in batch]\n")
    questions = Path(settings["prompts"]["path"])
    whys = {each.stage: each.why for each in plan(Workspace(asked))}
    assert whys["annotate references"] == "my_rewards.py changed"
    questions.write_text(questions.read_text() + json.dumps({"prompt": "Say more", "answer": 1}) + "\n")
    whys = {each.stage: each.why for each in plan(Workspace(asked))}
    assert whys["prepare prompts"] == "questions.jsonl changed"


def test_the_figures_of_the_8b_page_are_those_of_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = RESULTS.parents[1]
    monkeypatch.chdir(root)
    shapes = "experiments/shapes"
    asked = load_experiment(
        "experiments/8b.yaml",
        [
            f"model.path={shapes}/llama-3.1-8b",
            f"reward.model.path={shapes}/skywork-reward-v2-llama-3.1-8b",
            f"store.path={tmp_path / 'store'}",
            "vllm.engines=8",
        ],
    )
    with without_weights():
        workspace = Workspace(asked)
        check(workspace, runs=False)
        stages = with_expected(workspace, plan(workspace), KNOWN["h100"])
    page = (root / "docs" / "how-to" / "8b-on-8-gpus.md").read_text("utf-8")
    for name in ("sample references", "annotate references", "score reference log-probs", "train policy"):
        (expected,) = (each.expected for each in stages if each.stage == name)
        assert expected is not None
        assert f"| {name} | {duration(expected.seconds)} | {expected.gpus} |" in page
    assert "{:.1f} in all, {:.1f} to {:.1f}.".format(*total(stages).gpu_hours) in page
