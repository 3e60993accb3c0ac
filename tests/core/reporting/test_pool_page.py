"""The pool report in words and as a page."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from qrpo_core.common.errors import DataError
from qrpo_core.evaluation.judge_agreement import judge_agreement
from qrpo_core.evaluation.pool_report import (
    JudgedPool,
    LengthFacts,
    PoolReport,
    RewardSpread,
    judged_pool,
    more_references,
)
from qrpo_core.evaluation.results import Estimate
from qrpo_core.objective.density_ratio import DensityRatio
from qrpo_core.objective.transforms import get_transform
from qrpo_core.reporting.html.pool import render_pool_report
from qrpo_core.reporting.pool_text import headline, headlines, pool_lines

RATIO = DensityRatio(get_transform("identity"), 0.003)


def judge(place: float) -> JudgedPool:
    """A judge that agrees with the reward up to a quantile and then saturates."""
    rng = np.random.default_rng(0)
    reward = rng.random((100, 50))
    score = np.where(reward < place, reward, 1 + rng.random((100, 50)))
    position = ((reward[:, None, :] < reward[:, :, None]).sum(2) + 0.5) / 50
    columns = (each[:, :8].ravel() for each in (reward, position, score, np.ones((100, 50))))
    found = judge_agreement(np.repeat(np.arange(100), 8), *columns, references=50, resamples=100)
    return judged_pool(800, {}, found, ratio=RATIO, references=50)


@pytest.fixture(scope="module")
def report() -> PoolReport:
    rng = np.random.default_rng(0)
    prompt, rewards = np.repeat(np.arange(100), 8), rng.integers(0, 2, 800).astype(float)
    return PoolReport(
        name="<b>bold</b>",
        reward="python",
        objective="qrpo",
        beta=0.003,
        confidence=0.95,
        statuses={"timeout": 3},
        spread=RewardSpread(100, 800, 8, 8, 2, [(1.0, 0.5), (0.0, 0.5)], 0.99, 0.6, 60, 0.5, 0.5),
        length=LengthFacts(12.0, 0.4, Estimate(0.4, 0.35, 0.45), [(5.0, 0.3), (20.0, 0.7)], 7, 803, 0.8),
        more=more_references(prompt, rewards, ratio=RATIO),
        judges={
            "sharp": judge(0.7),
            "mute": JudgedPool(800, {"endpoint_error": 800}, None, None, None, None),
        },
    )


def test_a_judge_that_parts_cautions_against_a_small_beta_and_names_lambda(report: PoolReport) -> None:
    sharp = report.judges["sharp"]
    assert sharp.above is not None
    assert sharp.agreement is not None
    place = sharp.agreement.stops_rising.value
    assert sharp.truncation == place
    assert sharp.least_beta is not None
    assert sharp.above.spent > sharp.above.kl / 2  # so at this beta, below the least one
    assert sharp.least_beta > 0.003
    assert headline(report).startswith("Judge sharp agrees with the reward on ")
    texts = [str(each) for each in headlines(report)]
    (caution,) = [text for text in texts if "lambda" in text]
    assert f"lambda {place:.2f}" in caution
    assert "At beta 0.003 the optimum spends" in caution
    assert any("endpoint_error 800" in text for text in texts)
    assert any("The reward pays longer completions" in text for text in texts)
    assert any("60 of 100 prompts all rewards are equal" in text for text in texts)


def test_the_page_stands_alone_and_escapes_what_it_shows(report: PoolReport) -> None:
    page = render_pool_report(report)
    assert "<b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert not re.search(r"<script|<link|src=|href=\"http", page)
    assert page.count("<figure>") == 2
    assert page == render_pool_report(report)


def test_the_text_has_every_judge_and_every_part(report: PoolReport) -> None:
    text = "\n".join(pool_lines(report))
    for part in ("sharp", "mute", "0 of 800", "timeout 3", "7 of 803", "with 10 more a prompt"):
        assert part in text
    alone = replace(report, judges={}, objective="dpo", beta=None)
    assert "No judge has scored the pool" in "\n".join(pool_lines(alone))
    assert "evaluation.judges is empty" in render_pool_report(alone)


def test_the_json_form_returns_the_report(report: PoolReport) -> None:
    assert PoolReport.from_dict(report.to_dict()) == report
    with pytest.raises(DataError, match=r"not a pool report: spread\.prompts"):
        PoolReport.from_dict(report.to_dict() | {"spread": {}})
