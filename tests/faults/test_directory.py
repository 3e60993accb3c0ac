"""Whole runs on a directory: whatever happens, no row is lost, wrong, or bought twice for nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import scenarios
from tests.faults.scenarios import Ground

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kills", "stages"), [(7, 2), pytest.param(20, 4, marks=pytest.mark.long)])
def test_sigkill_at_random_moments(directory: Ground, kills: int, stages: int) -> None:
    """stages : of the four below, how many at least are met."""
    outcome = scenarios.sigkills(directory, kills, seed=0).check()
    assert outcome.injected == kills
    met = [each for each in ("sampling", "annotation", "log-probs", "commit") if each in outcome.detail]
    assert len(met) >= stages, outcome


def test_sigkill_between_the_steps_of_a_commit(directory: Ground) -> None:
    outcome = scenarios.commit_kills(directory, 9, seed=1).check()
    assert outcome.injected == 9
    assert "after manifest" in outcome.detail


def test_ctrl_c_keeps_what_was_done(directory: Ground) -> None:
    scenarios.interrupts(directory, 3, seed=2).check()


@pytest.mark.parametrize("processes", [6, pytest.param(16, marks=pytest.mark.long)])
def test_processes_race_for_the_same_blocks(directory: Ground, processes: int) -> None:
    races = (scenarios.race(directory, processes, until="compute quantiles").check() for _ in range(5))
    assert any(race.twice for race in races)  # in one of them at least they met


def test_two_runs_with_different_budgets(directory: Ground) -> None:
    scenarios.two_budgets(directory).check()


def test_damaged_blocks_are_made_again(directory: Ground) -> None:
    outcome = scenarios.damage(directory, list(scenarios.DAMAGE), seed=3).check()
    assert outcome.destroyed > 0


def test_damaged_artifacts_are_made_again(directory: Ground) -> None:
    scenarios.damaged_artifacts(directory, seed=4).check()


def test_a_disk_that_fills_up(directory: Ground) -> None:
    scenarios.full_disk(directory, 3, seed=5).check()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small(directory: Ground, disk: Path) -> None:
    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)

    scenarios.small_disk(directory, disk, grow).check()


def test_a_clock_that_jumps(directory: Ground) -> None:
    scenarios.jumping_clock(directory, 3, seed=6).check()
