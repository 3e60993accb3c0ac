"""The lab: what it calls exact is exact, its variants agree where they must, and a run resumes."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

STUDY = Path(__file__).resolve().parents[2] / "benchmarks" / "study"
DOCS = STUDY.parents[1] / "docs" / "concepts"
LAWS = ("continuous", "clipped", "graded", "binary")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module("_lab_world")


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module("_lab_targets")


@pytest.mark.parametrize("law", LAWS)
def test_quantiles_and_log_partition_are_exact(world: ModuleType, law: str) -> None:
    """Against 40,000 draws: three standard errors of a share are 0.0075, and below 0.05 of log Z."""
    made = world.make_world((5,), law, 2, 1).train
    rng = np.random.default_rng(0)
    mass = np.exp(made.log_reference[0, 0])
    action = rng.choice(len(mass), size=40_000, p=mass / mass.sum())
    reward = made.reward[0, 0, action]
    reward = np.where(made.atom[0, 0, action], reward, reward + world.JITTER * rng.random(len(action)))
    drawn = np.searchsorted(np.sort(reward), reward, side="right") / len(reward)
    for each in np.unique(action):
        assert drawn[action == each].mean() == pytest.approx(
            world.true_quantiles(made)[0, 0, each], abs=0.0075
        )
    log_z = np.log(np.exp(drawn / 0.1).mean())
    assert log_z == pytest.approx(world.true_log_partition(made, 0.1)[0, 0], abs=0.05)


@pytest.mark.parametrize("law", LAWS)
def test_the_optimum_is_one(world: ModuleType, law: str) -> None:
    """Its objective is beta log Z over actions, and no tilt of the reference policy has a higher one."""
    made = world.make_world((3,), law, 20, 1).train
    quantiles = world.true_quantiles(made)
    best = world.measures(made, quantiles, world.optimum(made, quantiles, 0.1), 0.1)["objective"]
    log_z = np.log(np.exp(made.log_reference + quantiles / 0.1).sum(axis=-1))
    assert best == pytest.approx(0.1 * log_z.mean(), rel=1e-12)
    for beta in (0.05, 0.09, 0.11, 0.5):
        other = world.measures(made, quantiles, world.optimum(made, quantiles, beta), 0.1)["objective"]
        assert other < best


def test_without_ties_every_estimate_of_log_z_is_the_populations(targets: ModuleType) -> None:
    made, quantiles, _ = targets.world_of((1, 2), "continuous", 30, 1)
    base = targets.Cell(law="continuous")
    rows = targets.rows_of(made, quantiles, base)
    expected = targets.targets(made, quantiles, rows, base)
    for variant in ("tie_aware", "shrunken", "shrunken_both", "true_log_z"):
        found = targets.targets(made, quantiles, rows, targets.Cell(law="continuous", variant=variant))
        assert found == pytest.approx(expected, abs=1e-9), variant


def test_equal_rewards_have_target_zero_and_a_shrunken_one_near_it(targets: ModuleType) -> None:
    """Binary rewards, 50 references that all pass or all fail."""
    made, quantiles, _ = targets.world_of((1,), "binary", 200, 1)
    cell = targets.Cell(law="binary", n=50, variant="tie_aware")
    rows = targets.rows_of(made, quantiles, cell)
    equal = np.ptp(rows.references.reward[0], axis=-1) == 0
    assert equal.any()
    assert targets.targets(made, quantiles, rows, cell)[0, equal] == pytest.approx(0, abs=1e-12)
    shrunken = targets.Cell(law="binary", n=50, variant="shrunken_both")
    found = targets.targets(made, quantiles, rows, shrunken)[0, equal] / shrunken.beta
    assert np.abs(found).max() < 0.2


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDY.parent))
    monkeypatch.syspath_prepend(str(STUDY))
    return importlib.import_module("_lab_tables")


def test_the_page_is_that_of_the_result_files(tables: ModuleType) -> None:
    """Its tables, and in its prose every number with three decimals is one of them."""
    results = tables.Results(tables.ROOT / "benchmarks" / "results" / "study")
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.rendered(page, results)
    assert set(re.findall(r"<!-- lab: (\w+) -->", page)) == set(tables.TABLES)
    prose = re.sub(r"<!-- lab: \w+ -->.*?<!-- end -->", "", page, flags=re.S)
    made = "".join(re.findall(r"<!-- lab: \w+ -->.*?<!-- end -->", page, flags=re.S))
    assert [each for each in re.findall(r"\d\.\d{3}\b", prose) if each not in made] == []


def test_the_page_of_decisions_quotes_the_section_that_it_links() -> None:
    sections = dict.fromkeys([""], (DOCS / "lab.md").read_text(encoding="utf-8"))
    for title, text in re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", sections[""], re.MULTILINE):
        sections["#" + title.lower().replace(" ", "-")] = text
    quoted = []
    for line in (DOCS / "which.md").read_text(encoding="utf-8").splitlines():
        section = re.search(r"\(lab\.md(#[\w-]+)\)", line)
        for figure in re.findall(r"\d\.\d{3} ± \d\.\d{3}", line):
            quoted.append(figure)
            assert figure in sections[section[1] if section else ""], line
    assert len(quoted) > 12


def test_the_results_hold_every_cell_at_full_size(tables: ModuleType) -> None:
    lab = importlib.import_module("lab")
    held = lab.read(lab.RESULTS, lab.size(quick=False))
    assert [key for make in lab.ENTRIES.values() for key in map(lab.key, make()) if key not in held] == []


def test_interpolation_at_equal_kl_is_exact_on_the_curve(tables: ModuleType) -> None:
    """At the KL of a trained policy it is that policy's reward, and beyond the trained ones it is nan."""
    kl = np.array([0.1, 0.4, 1.0])
    cells = [tables.Cell(law="graded", beta=beta) for beta in (0.3, 0.1, 0.03)]

    class Made(dict):  # type: ignore[type-arg]
        def reference(self, law: str) -> dict[str, np.ndarray]:
            return {"kl": np.zeros(2), "reward": np.zeros(2)}

    made = Made(
        (cell, {"kl": np.full(2, at), "reward": np.array([at**0.5, at])})
        for cell, at in zip(cells, kl, strict=True)
    )
    found = tables.at_equal_kl(made, cells, (0.05, 0.1, 0.4, 1.0, 1.1))
    assert np.isnan(found[[0, 4]]).all()
    assert found[1:4, 0] == pytest.approx(kl**0.5, rel=1e-12)
    assert found[1:4, 1] == pytest.approx(kl, rel=1e-12)


def test_a_run_resumes_and_computes_nothing_twice(tmp_path: Path) -> None:
    command = [sys.executable, str(STUDY / "lab.py"), "--quick", "--results", str(tmp_path)]
    first = subprocess.run([*command, "threshold"], check=True, capture_output=True, text=True)
    assert "computed 30 cells" in first.stdout
    path = tmp_path / "lab_threshold.json"
    whole = json.loads(path.read_text())
    assert len(whole["cells"]) == 30
    assert all(len(each["measures"]["reward"]) == 2 for each in whole["cells"])
    path.write_text(json.dumps(whole | {"cells": whole["cells"][:28]}))
    again = subprocess.run([*command, "threshold"], check=True, capture_output=True, text=True)
    assert "computed 2 cells" in again.stdout
    assert json.loads(path.read_text())["cells"] == whole["cells"]
