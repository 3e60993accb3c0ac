#!/usr/bin/env bash
# alpaca-eval 0.6.6: the length-controlled win rate depends on the order of the annotations.
# AlpacaEval 2 reports a win rate that a logistic regression corrects for length and for the difficulty of each
# instruction. One expects the same number for the same annotations in any order, as for the plain win rate. The
# difficulty of an instruction is looked up by the position of its row, so shuffled rows, or a part of them, get
# difficulties of other instructions; nothing is said.
# Seen: 200 annotations, the same shuffled: the plain win rate is equal, the length-controlled one is not.
# The table of difficulties, which the package takes from the hub, is made here: nothing is downloaded.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet alpaca-eval==0.6.6 openai==3.57.0 pandas==3.1.1 numpy==2.4.6 "scikit-learn<1.10"
cd "$work"
PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PY'
import logging
import random

import numpy as np
import pandas as pd
from alpaca_eval.metrics import glm_winrate

logging.disable(logging.CRITICAL)
count, rng = 200, np.random.default_rng(0)
difficulty = rng.normal(size=count)
known = [
    {
        "index": index,
        "model": model,
        "preference": float(np.clip(0.5 + 0.2 * longer - 0.1 * difficulty[index], 0, 1)),
        "std_delta_len": longer,
        "instruction_difficulty": difficulty[index],
        "not_gamed_baseline": False,
    }
    for model, longer in (("first", -1.0), ("second", 1.0))
    for index in range(count)
]
pd.DataFrame(known).to_csv("known.csv", index=False)
glm_winrate.hf_hub_download = lambda **where: "known.csv"
rows = [
    {
        "instruction": f"instruction {index}",
        "output_1": "x" * int(rng.integers(5, 50)),
        "output_2": "y" * int(rng.integers(20, 90)),
        "preference": float(1 + np.clip(0.5 - 0.3 * difficulty[index], 0.01, 0.99)),
        "annotator": "judge",
        "generator_1": "base",
        "generator_2": "policy",
    }
    for index in range(count)
]
shuffled = rows[:]
random.Random(1).shuffle(shuffled)
found = [glm_winrate.get_length_controlled_winrate(each, save_weights_dir=None) for each in (rows, shuffled)]
for name in ("win_rate", "length_controlled_winrate"):
    print(name, *(round(each[name], 2) for each in found))
assert abs(found[0]["win_rate"] - found[1]["win_rate"]) < 1e-9, "changed"
assert abs(found[0]["length_controlled_winrate"] - found[1]["length_controlled_winrate"]) > 0.5, "changed"
PY
echo "as described"
