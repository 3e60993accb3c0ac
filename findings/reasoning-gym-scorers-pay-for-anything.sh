#!/usr/bin/env bash
# reasoning-gym 0.1.25: three tasks give the full score to answers that are wrong.
# score_answer is the verifiable reward of a task, so one expects a constant to score little. game_of_life_halting
# pays 1 for every text that is not empty, coin_flip for "0" whatever the coin's probability, puzzle24 for the
# answer of another puzzle. A policy that is trained on them learns to say anything.
# Seen: the scores below, on ten entries each.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet reasoning-gym==0.1.25
"$work/venv/bin/python" - <<'PY'
import reasoning_gym

def scores(task, answer):
    data = reasoning_gym.create_dataset(task, size=10, seed=0)
    entries = list(data)
    given = [entries[(i + 1) % 10]["answer"] if answer is None else answer for i in range(10)]
    return [data.score_answer(each, entry) for each, entry in zip(given, entries)]

found = {
    "game_of_life_halting, 'no idea'": scores("game_of_life_halting", "no idea"),
    "coin_flip, '0'": scores("coin_flip", "0"),
    "puzzle24, another puzzle's answer": scores("puzzle24", None),
}
for name, values in found.items():
    print(name, values)
assert all(value == 1 for value in found["game_of_life_halting, 'no idea'"]), "changed"
assert sum(value == 1 for value in found["coin_flip, '0'"]) >= 5, "changed"
assert sum(value == 1 for value in found["puzzle24, another puzzle's answer"]) >= 5, "changed"
PY
echo "as described"
