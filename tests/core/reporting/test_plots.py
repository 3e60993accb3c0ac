"""Figures: the same bytes each time, nothing outside, and histograms that tell the truth."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError
from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.metrics import evaluate_policies, prompt_means
from qrpo_core.reporting.html.canvas import figure_png, figure_svg
from qrpo_core.reporting.html.plots import (
    _curves,
    _edges,
    _quantile_bins,
    _signed_edges,
    length_figure,
    quantile_figure,
    reward_figure,
    target_figure,
    training_figure,
)

HISTORY = [
    {"step": s, "epoch": s / 9, "loss": 1 / s, "grad_norm": 2.0 + s, "odd $x$ <key>": s} for s in range(1, 9)
]


@pytest.fixture(scope="module")
def all_figures(pair, random_rewards):
    """A function that draws every figure anew from the same data."""
    data = pair(random_rewards(1, 40, 2), random_rewards(2, 40, 2, shift=0.4), num_tokens=[*range(5, 85)])
    result = evaluate_policies(data, EvaluationConfig(resamples=200))

    def draw():
        curves = training_figure(HISTORY)
        assert curves is not None
        return {
            "rewards": reward_figure(prompt_means(data), result),
            "quantiles": quantile_figure(np.tile(np.arange(8) / 7, 5)),
            "targets": target_figure(np.linspace(-5, 2, 50)),
            "training": curves[0],
            "length": length_figure(data),
        }

    return draw


def test_svg_is_deterministic_and_stands_alone(all_figures):
    first, second = all_figures(), all_figures()
    ids: list[str] = []
    for name, figure in first.items():
        svg = figure_svg(figure, name, 'about "this" & <that>')
        assert svg == figure_svg(second[name], name, 'about "this" & <that>')
        assert svg.startswith('<svg role="img" aria-label="about &quot;this&quot; &amp; &lt;that>" viewBox=')
        assert "http" not in svg
        assert "<!--" not in svg
        # What it refers to is its own, or data.
        references = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', svg)
        assert references
        found = set(re.findall(r'\bid="([^"]*)"', svg))
        for link in (a or b for a, b in references):
            assert link.removeprefix("#") in found or link.startswith("data:image/png;base64,")
        # Every token follows the page: its colour stands only as the fallback of its variable.
        assert "var(--after, #0072b2)" in svg
        assert not re.search(r"(?<!, )#0072b2", svg)
        ids += found
    assert len(ids) == len(set(ids))


def test_png_is_deterministic(all_figures):
    first, second = (figure_png(all_figures()["rewards"]) for _ in range(2))
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first == second
    assert int.from_bytes(first[16:20], "big") == 900  # 6.25 inches at 144 dpi


def test_many_points_become_a_bitmap(pair, random_rewards):
    few = length_figure(pair(random_rewards(1, 10, 2), random_rewards(2, 10, 2)))
    assert "<image" not in figure_svg(few, "few", "")
    many = figure_svg(length_figure(pair(random_rewards(1, 800, 2), random_rewards(2, 800, 2))), "many", "")
    assert many.count("<image") == 2
    assert len(many) < 300_000


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 400), st.booleans())
def test_a_uniform_grid_fills_all_bins_equally(references, told):
    """Aliasing of the grid with the bins would look like ties."""
    steps = references - 1
    quantiles = np.arange(references) / steps
    bins = _quantile_bins(quantiles, steps if told else None)
    counts = np.histogram(quantiles, bins=bins, range=(0, 1))[0]
    assert counts.sum() == references
    if steps <= 64 or (any(references % b == 0 for b in range(10, 33)) and told):
        assert counts.min() == counts.max()
    else:
        assert counts.max() - counts.min() <= 1 + references // 20 // 4


@pytest.mark.parametrize(
    ("values", "steps", "bins"),
    [
        ([1.0, 1.0], 7, 8),  # all tied: the grid is not in the values, so it must be told
        ([1.0, 1.0], None, 2),
        ([0.0, 1 / 7, 2.5 / 7, 1.0], 7, 8),  # mid-ranks
        ([0.0, 0.25, 1.0], 7, 5),  # contradicts seven steps
        ([0.123456, 0.7171717], 7, 20),  # randomised: no grid
    ],
)
def test_quantile_bins(values, steps, bins):
    assert _quantile_bins(np.array(values), steps) == bins


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.lists(st.integers(-20, 20).map(lambda k: k * 0.1), min_size=1, max_size=60),
        st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60),
    )
)
def test_no_value_is_lost_and_signs_stay_apart(values):
    data = np.array(values)
    for edges in (_edges(data), _edges(data, data + 1), _signed_edges(data)):
        assert len(edges) <= 45
        assert np.histogram(data, edges)[0].sum() == data.size
    # No bar holds both signs, unless zeros stand between them; 1e-5 of the span is rounding of a grid.
    edges = np.array(_signed_edges(data))
    if not (data == 0).any():
        clear = data[np.abs(data) > 1e-5 * np.ptp(data)]
        up, down = (np.histogram(part, edges)[0] for part in (clear[clear > 0], clear[clear < 0]))
        assert not (up * down).any()


def test_grid_values_stand_amid_their_bins():
    edges = np.array(_signed_edges(np.array([-0.5, -0.25, 0.25, 0.25, 0.75])))
    np.testing.assert_allclose((edges[:-1] + edges[1:]) / 2, [-0.5, -0.25, 0, 0.25, 0.5, 0.75], atol=1e-12)


def test_curves_keep_order_and_count_what_is_left_out():
    history = [
        {"step": 1, "grad_norm": math.inf, "loss": 2.0, "zeta": 1, "alpha": 1, "epoch": 0.5, "note": "x"},
        {"step": 2, "grad_norm": 1.0, "loss": 1.0, "zeta": 1, "alpha": 1, "flag": True},
        {"step": 2, "train_runtime": 3.0, "train_loss": 1.5, "total_flos": 1e9},
    ]
    curves, notes = _curves(history)
    assert list(curves) == ["loss", "grad_norm", "alpha", "zeta"]
    assert curves["loss"] == [(1.0, 2.0), (2.0, 1.0)]
    assert notes == ["1 values of grad_norm are not finite"]
    with pytest.raises(DataError, match=r"no step .*entry 1"):
        _curves([{"step": 1, "loss": 1.0}, {"loss": 2.0}])


def test_curves_beyond_eight_are_named():
    found = training_figure([{"step": 1} | {f"k{i}": i for i in range(10)}])
    assert found is not None
    assert found[1] == ["not drawn: k8, k9"]


def test_no_history_no_figure():
    assert training_figure([]) is None
    assert training_figure([{"step": 5, "train_runtime": 3.0}]) is None


@pytest.mark.parametrize("values", [[], [1.2], [-0.1], [math.nan]])
def test_impossible_quantiles_are_refused(values):
    with pytest.raises(DataError, match=r"quantiles must be numbers in \[0, 1\]"):
        quantile_figure(np.array(values, dtype=float))


@pytest.mark.parametrize("values", [[], [math.inf], [math.nan]])
def test_impossible_targets_are_refused(values):
    with pytest.raises(DataError, match="targets must be finite"):
        target_figure(np.array(values, dtype=float))
