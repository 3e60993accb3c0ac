"""The tables of normalisers, beta and n in the documents are those of benchmarks/results/normalisers.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qrpo_core.objective import get_transform, objective_facts, references_needed

ROOT = Path(__file__).resolve().parents[3]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "normalisers.json").read_text(encoding="utf-8"))
CONCEPT = (ROOT / "docs" / "concepts" / "normaliser-beta-n.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "reference" / "method.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", RESULT["by_beta"], ids=lambda row: str(row["beta"]))
def test_the_table_by_beta_is_the_result_and_the_code(row):
    facts, needed = objective_facts(get_transform("identity"), row["beta"]), row["references_needed"]
    assert row["largest_log_ratio"] == pytest.approx(facts.largest_log_ratio, abs=0.006)
    assert row["threshold"] == pytest.approx(facts.pushed_down, abs=6e-5)
    for probability, count in needed.items():
        found = references_needed(get_transform("identity"), row["beta"], probability=float(probability))
        assert found == count
    cells = (
        f"{row['beta']}",
        f"{row['largest_log_ratio']} nats",
        f"{row['kl']} nats",
        f"{100 * row['threshold']:.1f} %",
        f"{needed['0.9']:,}",
    )
    assert f"| {' | '.join(cells)} |" in CONCEPT


def test_the_table_of_bias_is_the_result():
    for row in RESULT["bias"]:
        if row["law"] == "one_percent_tied":
            continue
        found = (row[name] for name in ("population", "finite", "empirical", "tie_aware"))
        cells = " | ".join(f"{each['bias']:+.2f} ± {each['standard_error']:.2f}" for each in found)
        assert f"| {row['n']}, {row['beta']} | {cells} |" in METHOD
    at = {
        row["beta"]: row["empirical"] for row in RESULT["bias"] if (row["law"], row["n"]) == ("continuous", 8)
    }
    low = {beta: f"{-each['bias']:.2f} ± {each['standard_error']:.2f}" for beta, each in at.items()}
    assert (
        f"{low[0.1]} nats at 8 reference completions and beta 0.1, and by {low[0.01]} at beta 0.01" in CONCEPT
    )


def test_the_expected_means_in_the_documents_are_the_result():
    means = {(row["n"], row["beta"]): row["mean_exp_target"] for row in RESULT["expected"]}
    assert f"({means[8, 0.1]} at n = 8, beta 0.1; {means[50, 0.003]} at n = 50, beta 0.003)" in METHOD
    assert f"{means[8, 0.1]} at 8 reference completions" in CONCEPT


@pytest.mark.parametrize("n", [4, 16, 50])
@pytest.mark.parametrize("tie_method", ["weak", "mid"])
def test_the_table_of_successes_is_the_result(n, tie_method):
    rows = [row for row in RESULT["successes"] if row["n"] == n]
    assert [row["beta"] for row in rows] == [0.3, 0.1, 0.03, 0.01, 0.003]
    cells = " | ".join(f"{row[tie_method]['bias']}" for row in rows)
    assert f"| {n} | `{tie_method}` | {cells} |" in CONCEPT
