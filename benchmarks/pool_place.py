"""How often the interval of the pool report holds the place where a judge parts from the reward.

Planted pools of uniform rewards. The judge agrees below a quantile. Above it its scores are random: all
better than those below (saturates), or anything (falls off). Two more judges have no such place: one is
independent (0), one is the reward with normal noise of half its range (noisy, 1).

    python benchmarks/pool_place.py --output benchmarks/results/pool_place.json
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from _result import about, options, publish

from qrpo_core.evaluation.judge_agreement import judge_agreement

PROMPTS, JUDGED = 200, 8
PLANTED = [
    *itertools.product(("saturates", "falls off"), (0.5, 0.7, 0.9)),
    ("independent", 0.0),
    ("noisy", 1.0),
]
CELLS = itertools.product(PLANTED, (16, 50))


def pool(kind: str, place: float, references: int, seed: int) -> dict[str, Any]:
    """The columns of one planted pool, of which some completions of each prompt are judged."""
    rng = np.random.default_rng(seed)
    reward, noise = rng.random((2, PROMPTS, references))
    top = place + (1 - place) * noise if kind == "saturates" else noise
    score = np.where(reward < place, reward, top)
    if kind == "noisy":
        score = reward + 0.5 * rng.standard_normal(reward.shape)
    position = ((reward[:, None, :] < reward[:, :, None]).sum(2) + 0.5) / references
    columns = {"rewards": reward, "position": position, "scores": score, "lengths": np.ones_like(reward)}
    found = {name: column[:, :JUDGED].ravel() for name, column in columns.items()}
    return {"prompt": np.repeat(np.arange(PROMPTS), JUDGED), **found, "references": references}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--pools", type=int, default=40, help="planted pools of each kind")
    parser.add_argument("--resamples", type=int, default=100)
    asked = parser.parse_args()
    result = about("pool_place", prompts=PROMPTS, judged=JUDGED, pools=asked.pools, level=0.95)
    result["rows"] = []
    for (kind, place), references in CELLS:
        pools = (pool(kind, place, references, seed) for seed in range(asked.pools))
        found = [judge_agreement(**each, resamples=asked.resamples) for each in pools]
        places = [each.stops_rising for each in found]
        values = np.array([each.value for each in places])
        ends = np.array([(each.low, each.high) for each in places], dtype=float)
        result["rows"].append(
            {
                "judge": kind,
                "place": place,
                "references": references,
                "parts": float(np.mean([each.parts for each in found])),
                "followed": float(np.mean([each.follows for each in found])),
                "estimate_mean": round(float(values.mean()), 4),
                "estimate_sd": round(float(values.std(ddof=1)), 4),
                "interval_mean": ends.mean(axis=0).round(4).tolist(),
                "interval_holds_the_place": float(((ends[:, 0] <= place) & (place <= ends[:, 1])).mean()),
            }
        )
        print(result["rows"][-1], flush=True)
    publish(result, asked.output, shown="")


if __name__ == "__main__":
    main()
