"""What each normaliser does to the targets, and how many references a target's sign needs.

    python benchmarks/normalisers.py [--output benchmarks/results/normalisers.json]

Simulated rewards with known quantiles; the transform is the identity, samples are references and are left out
of their own ranking (docs/reference/method.md, section 3.6). No model, about a minute on one core.

by_beta : facts of the objective before any data, and `references_needed` at three probabilities, of which 0.9
    is what `qrpo budget` shows.
bias : target/beta less the true log-ratio, nats: its mean over prompts with standard error, and its spread.
    tie_aware_left_out takes a sample out of its own log Z as well.
expected : Z_(n-1)/Z, the mean of exp(target/beta) of targets without any error.
successes : binary rewards, success rates uniform, normaliser tie_aware: target/beta of a success less
    the true log-ratio, nats, under the tie methods weak and mid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from _result import about, options, publish

from qrpo_core.objective import (
    finite_log_partition,
    get_transform,
    objective_facts,
    reference_targets,
    references_needed,
    tie_aware_log_partition,
    tie_rate,
)

IDENTITY = get_transform("identity")
BETAS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
SIZES = ((8, 0.1), (8, 0.01), (50, 0.01))
LAWS = ("continuous", "one_percent_tied", "floor_30_percent", "ceiling_30_percent", "binary", "five_grades")
NORMALISERS = ("population", "tie_aware", "finite", "empirical")
PROMPTS = {8: 4000, 50: 1000}


def masses(law: str, prompts: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The cells of (0, 1) from the lowest reward up: their masses [prompts, cells], and which are atoms."""
    if law == "binary":
        p = rng.random(prompts)
        return np.stack([1 - p, p], axis=1), np.array([True, True])
    if law == "five_grades":
        return rng.dirichlet(np.ones(5), prompts), np.ones(5, dtype=bool)
    cells, atoms = {
        "continuous": ([1.0], [False]),
        "one_percent_tied": ([0.495, 0.01, 0.495], [False, True, False]),
        "floor_30_percent": ([0.3, 0.7], [True, False]),
        "ceiling_30_percent": ([0.7, 0.3], [False, True]),
    }[law]
    return np.tile(cells, (prompts, 1)), np.array(atoms)


def world(law: str, n: int, beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(prompt, reward, true log-ratio target, atoms) of n references a prompt; flat."""
    rng = np.random.default_rng(0)
    prompts = PROMPTS[n]
    mass, atom = masses(law, prompts, rng)
    right = mass.cumsum(axis=1)
    right[:, -1] = 1.0
    left = right - mass
    # A tiny mass would make a stretch of no length; its term is then 0.
    between = IDENTITY.log_mean(np.minimum(left, right - 1e-15).clip(0.0), right, beta)
    log_z = np.log((mass * np.exp(np.where(atom, right / beta, between) - 1 / beta)).sum(axis=1)) + 1 / beta
    u = rng.random((prompts, n))
    cell = (u[:, :, None] >= right[:, None, :]).sum(axis=2).clip(max=mass.shape[1] - 1)
    quantile = np.where(atom[cell], np.take_along_axis(right, cell, axis=1), u)
    reward = cell + np.where(atom[cell], 0.0, 0.5 * u)
    ratio = quantile / beta - log_z[:, None]
    return np.repeat(np.arange(prompts), n), reward.ravel(), ratio.ravel(), np.flatnonzero(atom)


def summary(off: np.ndarray, n: int) -> dict[str, float]:
    """off : log-ratio targets less the true ones, nats, [prompts * n]."""
    by_prompt = off.reshape(-1, n).mean(axis=1)
    return {
        "bias": round(float(by_prompt.mean()), 3),
        "standard_error": round(float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))), 3),
        "spread": round(float(off.std()), 3),
    }


def left_out(prompt: np.ndarray, reward: np.ndarray, atoms: np.ndarray, n: int, beta: float) -> np.ndarray:
    """The tie-aware log Z of each sample from the other n - 1 references of its prompt."""
    others = np.array([[j for j in range(n) if j != i] for i in range(n)])
    table = reward.reshape(-1, n)[:, others].reshape(len(reward), n - 1)
    owner = np.repeat(np.arange(len(reward)), n - 1)
    return tie_aware_log_partition(IDENTITY, beta, owner, table.ravel(), atoms=atoms)


def bias(law: str, n: int, beta: float) -> dict[str, Any]:
    prompt, reward, ratio, atoms = world(law, n, beta)
    found: dict[str, Any] = {"law": law, "n": n, "beta": beta, "tie_rate": round(tie_rate(prompt, reward), 3)}
    for normaliser in NORMALISERS:
        made = reference_targets(
            prompt, reward, transform=IDENTITY, beta=beta, normaliser=normaliser, tie_tolerance=1.0
        )
        found[normaliser] = summary(made.log_ratio - ratio, n)
    found["tie_aware_left_out"] = summary(
        made.quantile / beta - left_out(prompt, reward, atoms, n, beta) - ratio, n
    )
    return found


def successes(n: int, beta: float) -> dict[str, Any]:
    """A success is left out of its own rank, not of log Z; under mid ranks these are two quantiles."""
    rng = np.random.default_rng(0)
    prompts = 20000 // n
    rate = rng.random(prompts)
    reward = (rng.random((prompts, n)) < rate[:, None]).astype(float).ravel()
    prompt = np.repeat(np.arange(prompts), n)
    found: dict[str, Any] = {"n": n, "beta": beta}
    for tie_method, top in (("weak", np.ones(prompts)), ("mid", 1 - 0.5 * rate)):
        low = top - rate if tie_method == "weak" else 0.5 * (1 - rate)
        log_z = np.logaddexp(np.log(rate) + top / beta, np.log1p(-rate) + low / beta)
        made = reference_targets(prompt, reward, transform=IDENTITY, beta=beta, tie_method=tie_method)
        off = (made.log_ratio - (top / beta - log_z)[prompt])[reward == 1]
        bias = round(float(off.mean()), 2) + 0.0  # no negative zero
        found[tie_method] = {"bias": bias, "spread": round(float(off.std()), 2)}
    return found


def by_beta(beta: float) -> dict[str, Any]:
    facts = objective_facts(IDENTITY, beta)
    return {
        "beta": beta,
        "threshold": round(facts.pushed_down, 4),
        "quantile": round(0.5 * (1 + facts.pushed_down), 4),
        "largest_log_ratio": round(facts.largest_log_ratio, 2),
        "kl": round(facts.kl, 2),
        "references_needed": {
            str(p): int(references_needed(IDENTITY, beta, probability=p)) for p in (0.8, 0.9, 0.95)
        },
    }


def expected(n: int, beta: float) -> dict[str, float]:
    log = float(finite_log_partition(IDENTITY, beta, n - 1)) - float(IDENTITY.log_partition(beta))
    return {"n": n, "beta": beta, "mean_exp_target": round(float(np.exp(log)), 2)}


def main() -> None:
    arguments = options(__doc__).parse_args()
    result = about("normalisers: bias of targets, references for a sign", prompts=PROMPTS)
    result["by_beta"] = [by_beta(beta) for beta in BETAS]
    result["expected"] = [expected(n, beta) for n, beta in ((8, 0.1), (8, 0.01), (50, 0.01), (50, 0.003))]
    result["bias"] = [bias(law, n, beta) for law in LAWS for n, beta in SIZES]
    result["successes"] = [successes(n, beta) for n in (4, 16, 50) for beta in (0.3, 0.1, 0.03, 0.01, 0.003)]
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
