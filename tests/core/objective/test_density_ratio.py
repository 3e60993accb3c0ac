"""Density ratios and their integrals: TUP against 50-digit values, best-of-N against QRPO, laws, limits."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.config import ObjectiveConfig
from qrpo_core.objective import calibrated_targets, finite_log_partition, get_transform, rank_counts_table
from qrpo_core.objective.clipping import clip_log_ratio
from qrpo_core.objective.density_ratio import DensityRatio
from qrpo_core.objective.truncated_logit import TruncatedLogit
from qrpo_core.objective_kinds import KINDS, make_objective
from qrpo_core.objective_kinds.targets import QuantileObjective

GOLDEN = json.loads(Path(__file__).with_name("tup_partition.json").read_text(encoding="utf-8"))
LAMBDAS = st.floats(1e-6, 1 - 1e-6)
BETAS = st.floats(math.log(1e-4), math.log(10)).map(math.exp)


def ratios(config: ObjectiveConfig) -> DensityRatio:
    made = make_objective(config)
    assert isinstance(made, QuantileObjective)
    return made.ratio()


def test_the_mean_over_every_stretch_is_that_of_50_digits() -> None:
    assert len(GOLDEN) > 140
    for row in GOLDEN:
        low, high, beta = (np.array([row[name]]) for name in ("low", "high", "beta"))
        found = TruncatedLogit(row["truncation"]).log_mean(low, high, beta)[0]
        # Ends such as 0.875 - lambda and rewards' quantiles are known to 2^-53.
        assert found == pytest.approx(float(row["log_mean"]), rel=1e-14, abs=2e-14), row


@given(LAMBDAS, BETAS)
def test_stretches_add_up_and_a_stretch_that_is_truncated_is_empty(truncation: float, beta: float) -> None:
    edges = np.array([0.0, 0.25 * truncation, truncation, 0.5 + 0.5 * truncation, 1.0])
    parts = TruncatedLogit(truncation)._log_mean(edges[:-1], edges[1:], np.full(4, beta)) + np.log(
        np.diff(edges)
    )
    assert (parts[:2] == -np.inf).all()
    whole = float(TruncatedLogit(truncation).log_partition(beta))
    assert np.logaddexp.reduce(parts) == pytest.approx(whole, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize(
    "config",
    [
        *(ObjectiveConfig(kind="tup", beta=b, truncation=t) for b in (0.3, 2.0) for t in (0.01, 0.5, 0.9)),
        *(ObjectiveConfig(kind="best_of_n", candidates=n) for n in (1.5, 4, 64)),
        ObjectiveConfig(beta=0.1),
        ObjectiveConfig(beta=0.5, transform="square"),
    ],
)
def test_a_density_ratio_integrates_to_one_and_does_not_fall(config: ObjectiveConfig) -> None:
    """A sum over 2^20 middles of cells; the integrands have bounded slopes times the cell."""
    u = (np.arange(2**20) + 0.5) / 2**20
    log_ratio = ratios(config).log_ratio(u)
    assert (log_ratio[1:] >= log_ratio[:-1]).all()
    assert np.exp(log_ratio).mean() == pytest.approx(1.0, abs=2e-4)
    if config.kind == "tup":
        assert (log_ratio[u <= config.truncation] == -np.inf).all()


@given(st.floats(1.01, 1e4), st.floats(1e-9, 1.0))
def test_best_of_n_is_its_density_and_qrpos_log_transform(candidates: float, u: float) -> None:
    ratio = ratios(ObjectiveConfig(kind="best_of_n", candidates=candidates))
    by_hand = math.log(candidates) + (candidates - 1) * math.log(u)
    assert float(ratio.log_ratio(u)) == pytest.approx(by_hand, rel=1e-12, abs=1e-12)
    log = ratios(ObjectiveConfig(transform="log", beta=1 / (candidates - 1)))
    assert float(log.log_ratio(u)) == float(ratio.log_ratio(u))


@given(LAMBDAS, BETAS, st.floats(0.0, 1.0))
def test_tup_is_its_fixed_point(truncation: float, beta: float, u: float) -> None:
    """pi/pi_ref = (l/(1 - l))^(1/beta)/Z, 0 up to lambda."""
    ratio = ratios(ObjectiveConfig(kind="tup", truncation=truncation, beta=beta))
    found, label = float(ratio.log_ratio(u)), max(u - truncation, 0.0)
    if label == 0:
        assert found == -math.inf
    else:
        odds = math.log(label) - math.log(1 - u + truncation)
        assert found * beta + beta * ratio.log_integral == pytest.approx(odds, rel=1e-9, abs=1e-9)


def test_limits_of_tup() -> None:
    """beta towards 0 and infinity, lambda towards 0: what the density tends to."""
    # A large beta: (l/(1-l))^(1/beta) tends to 1 above lambda, so w tends to 1/(1 - lambda).
    flat = DensityRatio(TruncatedLogit(0.5), 1e6)
    assert float(flat.log_ratio(0.8)) == pytest.approx(math.log(2), abs=1e-5)
    # A small beta: all mass at the top, in a layer of width beta l(1 - l).
    for truncation in (0.2, 0.5, 0.7):
        steep = DensityRatio(TruncatedLogit(truncation), 1e-4)
        layer = -math.log(1e-4 * truncation * (1 - truncation))
        assert float(steep.log_ratio(1.0)) == pytest.approx(layer, abs=1e-3)
    # lambda near 0 and beta < 1: the odds of the top are 1/lambda, which takes everything.
    near = DensityRatio(TruncatedLogit(1e-9), 0.5)
    assert float(near.log_ratio(1.0)) == pytest.approx(math.log(1e9), abs=1e-6)
    assert float(near.log_ratio(0.999)) < -6


def test_tups_expected_partition_at_finite_n() -> None:
    """u is k/n for k = 0..n: a mean of n + 1 values, of which those up to lambda are 0."""
    transform, beta, n = TruncatedLogit(0.4), 0.3, 5
    values = [
        ((u - 0.4) / (1 - (u - 0.4))) ** (1 / beta) if u > 0.4 + 1e-12 else 0.0 for u in np.arange(6) / n
    ]
    expected = math.log(np.mean(values))
    assert float(finite_log_partition(transform, beta, n)) == pytest.approx(expected, rel=1e-12)
    # At n = 1 the one better completion takes the weight of both.
    assert float(finite_log_partition(transform, beta, 1)) == pytest.approx(
        math.log(0.6 / 0.4) / beta - math.log(2), rel=1e-12
    )


@pytest.mark.parametrize("kind", ["qrpo", "tup", "best_of_n"])
@pytest.mark.parametrize("normaliser", ["finite", "empirical", "auto"])
@pytest.mark.parametrize("beta", [1e-4, 0.1, 10.0])
def test_what_each_objective_does_at_ties_and_with_few_references(
    kind: str, normaliser: str, beta: float
) -> None:
    """A prompt of equal rewards has target 0 wherever Z is its own; a prompt of two rewards never NaN."""
    config = ObjectiveConfig(kind=kind) if kind == "best_of_n" else ObjectiveConfig(kind=kind, beta=beta)
    made = ratios(config)
    prompt = np.repeat([0, 1, 2], 4)
    rewards = np.array([1.0, 1, 1, 1, 0, 0, 0, 1, 0.1, 0.2, 0.3, 0.4])
    counts = rank_counts_table(prompt, rewards, prompt, rewards, in_pool=True)
    targets = calibrated_targets(
        counts,
        transform=made.transform,
        beta=made.beta,
        normaliser=normaliser,  # type: ignore[arg-type]
        tie_tolerance=1.0,
        prompt=prompt,
        reference_prompt=prompt,
        reference_rewards=rewards,
    )
    assert not np.isnan(targets.target).any()
    assert (targets.target < np.inf).all()
    if normaliser != "finite":
        assert (targets.target[:4] == 0).all()  # no signal
    assert targets.target[7] > targets.target[4]
    assert (targets.target[9:] >= targets.target[8:-1]).all()
    if kind == "tup":
        assert targets.target[8] == -np.inf


def test_a_clip_bounds_log_ratios_and_counts() -> None:
    u = np.array([0.2, 0.6, 1.0])
    counts = rank_counts_table(np.zeros(3, int), u, np.zeros(10, int), np.arange(1, 11) / 10, in_pool=False)
    made = ratios(ObjectiveConfig(kind="tup", beta=0.1))
    targets = calibrated_targets(
        counts, transform=made.transform, beta=0.1, normaliser="population", tie_tolerance=1.0
    )
    assert targets.log_ratio[0] == -np.inf
    clipped, binds = clip_log_ratio(targets, 3.0)
    assert binds == 2 + int(abs(targets.log_ratio[1]) > 3)
    assert clipped.log_ratio.tolist() == pytest.approx(np.clip(targets.log_ratio, -3, 3).tolist(), rel=1e-15)
    assert clip_log_ratio(clipped, 3.0)[1] == 0
    for limit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ObjectiveError, match="nats > 0"):
            clip_log_ratio(targets, limit)


@pytest.mark.parametrize("truncation", [0.0, 1.0, -0.5, math.nan])
def test_a_truncation_outside_the_open_interval_is_refused(truncation: float) -> None:
    with pytest.raises(ObjectiveError, match="truncation must lie between 0 and 1"):
        TruncatedLogit(truncation)


def test_a_kind_of_ratio_costs_one_short_file() -> None:
    folder = Path(__file__).parents[3] / "qrpo_core" / "objective_kinds"
    assert len((folder / "best_of_n.py").read_text(encoding="utf-8").splitlines()) <= 60
    assert "best_of_n" in KINDS
    settings = [own.name for kind in KINDS.values() for own in kind.settings]
    assert len(settings) == len(set(settings))
    assert get_transform("log") == ratios(ObjectiveConfig(kind="best_of_n")).transform


def test_the_table_of_the_documents_is_the_densities() -> None:
    """Sums over 2^16 middles of cells give every number of docs/concepts/objectives.md."""
    page = (Path(__file__).parents[3] / "docs" / "concepts" / "objectives.md").read_text(encoding="utf-8")
    u, seen = (np.arange(2**16) + 0.5) / 2**16, 0
    for kind, words, numbers in re.findall(r"^\| `(\w+)`, ([^|]*) \|(.* nats \|)$", page, re.M):
        own = dict(part.rsplit(" ", 1) for part in words.split(", "))
        ratio = ratios(ObjectiveConfig(kind=kind, **{name: float(value) for name, value in own.items()}))
        log_ratio = ratio.log_ratio(u)
        w = np.exp(log_ratio)
        kl = (w * np.where(w > 0, log_ratio, 0.0)).mean()
        shares = f"| {100 * (log_ratio > 0).mean():.1f} % | {100 * (w == 0).mean():.0f} %"
        top = f"| {float(ratio.log_ratio(1.0)):.2f} nats | {(w * u).mean():.3f} | {kl:.2f} nats |"
        assert f"|{numbers}" == f"{shares} {top}"
        seen += 1
    assert seen == 6
