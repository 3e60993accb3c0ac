"""The study on a real model: its page has the tables and the statements of its result files."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from qrpo_core.evaluation.comparison_results import ComparisonResult

STUDY = Path(__file__).parents[2] / "benchmarks" / "study" / "real_model"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDY.parents[1]))
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module("tables")


def ahead_of(tables: ModuleType, result: ComparisonResult, variant: str, scorer: int = 0) -> list[str]:
    """The objectives that are resolved to be behind this one."""
    pairs = [each for each in result.scorers[scorer].pairs if each.resolved]
    return sorted(
        tables.kind(next(name for name in each.names if name != each.better))
        for each in pairs
        if tables.kind(each.better) == variant
    )


def most_over_fewest(tables: ModuleType, scorer: int) -> str:
    """The difference of 64 and 4 reference completions with its interval."""
    pairs = {each.names: each for each in tables.result("references").scorers[scorer].pairs}
    value = pairs["references_per_prompt 10", "references_per_prompt 70"].difference
    return f"{-value.value:+.3f} [{-value.high:.3f}, {-value.low:.3f}]"


def test_the_page_has_the_tables_of_the_result_files(tables: ModuleType) -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert text == tables.rendered(text)
    assert text.count("<!-- real model: ") == 6


def test_the_readme_has_the_gains_of_every_objective(tables: ModuleType) -> None:
    scored = tables.result("objectives").scorers[0]
    shown = [f"`{tables.kind(each.variant)}` {each.gain.value:+.3f}" for each in scored.variants]
    text = re.sub(r"\s+", " ", (tables.ROOT / "README.md").read_text(encoding="utf-8"))
    assert ", ".join(shown) + ". Resolved:" in text


def test_the_figures_in_the_sentences_are_those_of_the_tables(tables: ModuleType) -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    section = text[text.index("## A language model") : text.index("## What is not resolved")]
    prose = re.sub(r"<!-- real model: .*?<!-- end -->", "", section, flags=re.S)
    quoted = re.findall(r"[+-]\d\.\d{3}", prose)
    assert len(quoted) >= 5
    made = most_over_fewest(tables, 0) + most_over_fewest(tables, 1)
    made += "".join(re.findall(r"<!-- real model: .*?<!-- end -->", section, flags=re.S))
    assert [each for each in quoted if each not in made] == []


def test_what_is_said_to_be_resolved_is_resolved(tables: ModuleType) -> None:
    result = tables.result("objectives")
    assert [each.scorer for each in result.scorers][:2] == ["reward", "judge polarity"]
    found = {kind: ahead_of(tables, result, kind) for kind in ("tup", "a_star", "qrpo", "rebel", "dpo")}
    assert found["tup"] == found["a_star"] == ["dpo", "sft", "simpo"]
    assert found["qrpo"] == ["sft"]
    assert found["rebel"] == found["dpo"] == ["sft", "simpo"]
    assert ahead_of(tables, result, "a_star", 1) == ["rebel", "sft", "simpo"]
    assert sum(each.resolved for each in result.scorers[1].pairs) == 3
    for scored, rose in ((result.scorers[2], True), (result.scorers[3], False)):
        assert not any(each.resolved for each in scored.pairs)
        assert {each.gain.low > 0 for each in scored.variants} == {rose}
    demo = tables.result("demo")
    assert ahead_of(tables, demo, "dpo") == ["qrpo", "rebel"]
    assert ahead_of(tables, demo, "rebel") == ["qrpo"]


def test_more_references_than_four_gained_nothing_that_is_resolved(tables: ModuleType) -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert f"{most_over_fewest(tables, 0)} in reward" in text
    assert f"{most_over_fewest(tables, 1)} by TextBlob's polarity" in text
    result = tables.result("references")
    assert not any(pair.resolved for scored in result.scorers for pair in scored.pairs)
    assert [len(scored.pairs) for scored in result.scorers] == [6] * 4
    polarity = {pair.names: pair.p_value for pair in result.scorers[1].pairs}
    value = polarity["references_per_prompt 10", "references_per_prompt 70"]
    assert f"(with that, p = {value:.2f})" in text
    assert result.seeds == (1, 2, 3, 4, 5)


def test_the_task_with_ties_gained_nothing(tables: ModuleType) -> None:
    result = tables.result("ties")
    (scored,) = result.scorers
    assert f"{scored.before.value:.0%}" == "17%"
    assert all(each.gain.low < 0 < each.gain.high for each in scored.variants)
    assert not any(each.resolved for each in scored.pairs)
    assert len(result.seeds) == 3


def test_the_study_cost_one_pool_and_its_own_trainings(tables: ModuleType) -> None:
    found = tables.read("objectives")
    computed, seconds = found["this_run"]["computed"], found["this_run"]["seconds"]
    assert computed["sample references"] == computed["annotate references"] == 2240
    assert computed["score reference log-probs"] == 280
    assert computed["train policy"] == found["store"]["train"]["count"] == 73
    own = sum(step["seconds"] for step in found["store"].values())
    assert seconds / own <= 1.1
    page = tables.PAGE.read_text(encoding="utf-8")
    assert f"took {seconds:,} s, {seconds / own:.2f} times" in page
    assert len(tables.result("objectives").seeds) == 5
    assert tables.result("objectives").prompts == 303
    assert {row["prompts"] for row in tables.read("tried")["rows"]} == {97}
    assert len(tables.read("tried")["rows"]) == 38
