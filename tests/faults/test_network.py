"""Whole runs whose requests to a real S3 server meet faults on the way."""

from __future__ import annotations

import math

import pytest

from tests.faults import s3_scenarios
from tests.faults.s3_scenarios import PASSING
from tests.faults.scenarios import Ground

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(
            what, marks=[] if what in ("503 SlowDown", "a put whose answer is lost") else pytest.mark.long
        )
        for what in PASSING
    ],
)
def test_a_fault_that_passes_is_not_noticed(bucket: Ground, s3_endpoint: str, what: str) -> None:
    outcome = s3_scenarios.passing(bucket, s3_endpoint, what, seed=0).check()
    assert outcome.twice == 0, outcome


@pytest.mark.parametrize("method", ["", "GET"])
def test_403_stops_the_run_and_is_not_absence(bucket: Ground, s3_endpoint: str, method: str) -> None:
    s3_scenarios.refused(bucket, s3_endpoint, seed=1, method=method).check()


def test_503_for_long_stops_the_run(bucket: Ground, s3_endpoint: str) -> None:
    s3_scenarios.overloaded(bucket, s3_endpoint, seed=2).check()


@pytest.mark.parametrize("seconds", [1.0, pytest.param(math.inf, marks=pytest.mark.long)])
def test_listings_that_lag(bucket: Ground, s3_endpoint: str, seconds: float) -> None:
    s3_scenarios.lagging(bucket, s3_endpoint, seconds, 3, seed=3).check()
