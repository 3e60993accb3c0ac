"""Whole runs on a real S3 server: whatever happens, no row is lost, wrong, or bought twice for nothing."""

from __future__ import annotations

import pytest

from tests.faults import scenarios
from tests.faults.scenarios import Ground

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_sigkill_at_20_random_moments(bucket: Ground) -> None:
    outcome = scenarios.sigkills(bucket, 20, seed=0).check()
    assert outcome.injected == 20
    for stage in ("sampling", "annotation", "log-probs", "commit"):
        assert stage in outcome.detail, outcome


def test_sigkill_between_the_steps_of_a_commit(bucket: Ground) -> None:
    outcome = scenarios.commit_kills(bucket, 6, seed=1).check()
    assert outcome.injected == 6
    assert "after manifest" in outcome.detail


@pytest.mark.long
def test_ctrl_c_keeps_what_was_done(bucket: Ground) -> None:
    scenarios.interrupts(bucket, 3, seed=2).check()


@pytest.mark.long
def test_16_processes_race_for_the_same_blocks(bucket: Ground) -> None:
    races = (scenarios.race(bucket, 16, until="compute quantiles").check() for _ in range(5))
    assert any(race.twice for race in races)  # in one of them at least they met


@pytest.mark.long
def test_two_runs_with_different_budgets(bucket: Ground) -> None:
    scenarios.two_budgets(bucket).check()


def test_damaged_blocks_are_made_again(bucket: Ground) -> None:
    outcome = scenarios.damage(bucket, list(scenarios.DAMAGE), seed=3).check()
    assert outcome.destroyed > 0


@pytest.mark.long
def test_damaged_artifacts_are_made_again(bucket: Ground) -> None:
    scenarios.damaged_artifacts(bucket, seed=4).check()


@pytest.mark.long
def test_a_clock_that_jumps(bucket: Ground) -> None:
    scenarios.jumping_clock(bucket, 3, seed=6).check()
