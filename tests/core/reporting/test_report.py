"""The report is one file that asks for nothing, escapes everything and repeats the table's numbers."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest
import yaml

from qrpo_core.common.errors import DataError
from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.inputs import EvaluationInput
from qrpo_core.evaluation.metrics import evaluate_policies
from qrpo_core.reporting.headlines import Headline, sort_headlines
from qrpo_core.reporting.html.report import TRAINING_ROWS, ReportInput, render_report, report_figures
from qrpo_core.reporting.summary import outcome, summary_rows

EVIL = "</div><script>alert('x')</script><img src=https://evil.example/a.png onerror=alert(1)> {{ 7 * 7 }}"


class Tags(HTMLParser):
    """Elements with their attributes, and all text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown += data


def _training(rows: int = 16) -> pa.Table:
    quantiles = [i % 8 / 7 for i in range(rows)]
    return pa.table(
        {
            "prompt_id": ["t"] * rows,
            "sample_index": list(range(rows)),
            "reward": [float(i) for i in range(rows)],
            "quantile": quantiles,
            "target": [q - 0.77 for q in quantiles],
            "log_ratio_target": [(q - 0.77) / 0.1 for q in quantiles],
            "num_tokens": [5] * rows,
        }
    ).cast(TRAINING_ROWS)


@pytest.fixture(scope="module")
def full(pair, random_rewards):
    data = pair(random_rewards(1, 30, 2), random_rewards(2, 30, 2, shift=1.0))
    return ReportInput(
        experiment={"name": "demo", "objective": {"beta": 0.1}, "prompts": {"templates": ["Say <b>{x}</b>"]}},
        evaluation=evaluate_policies(data, EvaluationConfig(resamples=200)),
        before=data.before,
        after=data.after,
        training=_training(),
        diagnostics={
            "normalisation_mean": 3.46,
            "normalisation_expected": 1.64,
            "normalisation_standard_error": 0.1,
            "normaliser": "population",
            "tie_rate": 0.25,
            "training_rows": 16,
            "own_number": 0.125,
        },
        history=[{"step": s, "loss": 1 / s} for s in range(1, 5)],
        stages=[{"stage": "sample", "reused": 1200, "computed": 34, "seconds": 75.2, "note": "12 tokens/s"}],
        filtered=[{"what": "duplicate prompts", "count": 3, "why": "prompt source"}],
        lineage={"train": "artifacts/train/abc", "torch": "2.13.0"},
        examples=[
            {"label": "median", "prompt": EVIL, "before": EVIL, "after": " \n", "reward_before": 0.5}
            | {"reward_after": 1.0, "mean_before": 0.25, "mean_after": 0.75}
        ],
    )


@pytest.fixture(scope="module")
def page(full):
    return render_report(full)


def test_the_page_asks_for_nothing(page):
    tags = Tags(page).tags
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:image/png;base64,")), (tag, name, target)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", page)
    policies = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_text_of_models_is_escaped_and_shown(page):
    assert "<script" not in page
    assert "{{ 7 * 7 }}" in page  # not evaluated
    assert Tags(page).shown.count(EVIL) == 2
    assert "Say <b>{x}</b>" in Tags(page).shown
    assert "(nothing visible was generated)" in page


def test_every_number_of_the_table_is_in_the_page_as_spelled(full, page):
    shown = Tags(page).shown
    for label, value in summary_rows(full.evaluation):
        assert label in shown
        assert value in shown
    assert outcome(full.evaluation).sentence in shown
    assert shown.index("QRPO report: demo") < shown.index(outcome(full.evaluation).sentence)


def test_headlines_stand_between_the_result_and_the_numbers(full):
    given = sort_headlines([Headline("note", "Trained on 3 <pairs>."), Headline("warning", "Cut: 100 %.")])
    shown = Tags(render_report(dataclasses.replace(full, headlines=given))).shown
    places = [
        shown.index(text)
        for text in (
            outcome(full.evaluation).sentence,
            "Warning: Cut: 100 %.",
            "Trained on 3 <pairs>.",
            "Difference in mean reward",
        )
    ]
    assert places == sorted(places)


def test_sections_come_in_order(page):
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "Figures",
        "Examples",
        "All numbers",
        "Training targets",
        "Filtered and failed",
        "Stages",
        "Settings",
        "Lineage",
    ]
    assert page.count("<svg ") == 5


def test_a_bad_normalisation_is_said(page):
    assert 'class="tile bad"' in page
    assert "Far from the value that normaliser population implies" in page
    assert "try normaliser: tie_aware" in page
    assert "must be 1" not in page


def test_tables_hold_what_was_given(full, page):
    shown = re.sub(r"\s+", " ", Tags(page).shown)
    for text in (
        "1 min 15 s",
        "1,200",
        "12 tokens/s",
        "duplicate prompts3prompt source",
        "own_number0.125",
    ):
        assert text in shown
    assert "artifacts/train/abc" in shown
    assert (
        "mean reward of this prompt 0.250 → 0.750" in shown
        or "mean reward of this prompt 0.25 → 0.75" in shown
    )
    settings = re.search(r'<pre class="settings">(.*?)</pre>', page, re.DOTALL)
    assert settings is not None
    assert yaml.safe_load(html.unescape(settings.group(1))) == full.experiment


def test_all_zero_is_said(full):
    zero = [{"what": "duplicate prompts", "count": 0}]
    page = render_report(dataclasses.replace(full, filtered=zero, history=(), training=_training(0)))
    assert "Nothing was filtered and nothing failed." in page
    assert "duplicate prompts" in page


def test_the_page_is_deterministic(full, page):
    assert render_report(full) == page


def test_light_dark_and_print(page):
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_what_is_not_given_is_said(full):
    bare = dataclasses.replace(
        full,
        training=_training(0),
        history=(),
        examples=(),
        diagnostics={},
        stages=(),
        filtered=(),
        lineage={},
    )
    page = render_report(bare)
    assert "No calibrated targets" in page
    assert "The training history holds no curve" in page
    assert "No examples were given." in page
    assert [figure.name for figure in report_figures(bare)] == ["rewards", "length"]


def _report(full, before, after, columns, side):
    data = EvaluationInput(
        side(before, logprobs=False), side(after, logprobs=True, **columns), temperature=1.0, top_p=1.0
    )
    result = evaluate_policies(data, EvaluationConfig(resamples=100))
    tables = {"before": data.before, "after": data.after}
    return dataclasses.replace(full, evaluation=result, **tables, history=(), training=_training(0))


EDGES = {
    "one prompt": ({"a": [0.5]}, {"a": [0.25]}, {}, "allows no interval"),
    "all equal": ({f"p{i}": [1.0] for i in range(30)},) * 2 + ({}, "did not change on any of 30"),
    "huge": ({f"p{i}": [i * 1e11] for i in range(30)}, {f"p{i}": [i * 2e11] for i in range(30)}, {}, "e+1"),
    "tiny": ({f"p{i}": [i * 1e-9] for i in range(30)}, {f"p{i}": [i * 2e-9] for i in range(30)}, {}, "rose"),
    "empty text": ({"a": [0.0, 1.0]}, {"a": [0.0, 1.0]}, {"num_tokens": [0, 1]}, "allows no interval"),
    "mostly failed": (
        {"a": [None, 1.0], "b": [None, None]},
        {"a": [None, 1.0], "b": [None, 1.0]},
        {},
        "3 of 4 completions before have no reward",
    ),
}


@pytest.mark.parametrize("case", EDGES)
def test_edge_cases_are_drawn_without_a_warning(full, side, case):
    before, after, columns, words = EDGES[case]
    page = render_report(_report(full, before, after, columns, side))
    assert words in Tags(page).shown
    assert not re.search(r"\bnan\b", Tags(page).shown)


def test_tables_of_another_evaluation_are_refused(full, side):
    rewards = {"a": [0.0], "b": [1.0]}
    other = dataclasses.replace(
        full, before=side(rewards, logprobs=False), after=side(rewards, logprobs=True)
    )
    with pytest.raises(DataError, match="the evaluation states a mean reward before of"):
        render_report(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"rows": 3}]}, "'stage' is missing .*stages, row 0"),
        ({"filtered": [{"what": "x"}]}, "'count' is missing .*filtered"),
        ({"examples": [{"prompt": "x"}]}, "'before' is missing .*examples, row 0"),
        ({"training": pa.table({"prompt_id": ["a"]})}, "missing column 'sample_index'"),
        ({"diagnostics": {"normalisation_mean": math.nan}}, "normalisation_mean is NaN"),
        ({"history": [{"loss": 1.0}]}, "no step"),
    ],
)
def test_incomplete_input_is_refused(full, change, message):
    with pytest.raises(DataError, match=message):
        render_report(dataclasses.replace(full, **change))
