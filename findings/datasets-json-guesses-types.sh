#!/usr/bin/env bash
# datasets 5.2.0: load_dataset on JSON Lines reads "2024-01-01" as a timestamp and 12345678901234567890124 as a float.
# JSON has strings and integers, so one expects a quoted date to stay text and an integer to keep its digits (or an
# error, since 5.x has a Json feature for what Arrow cannot hold). Both are changed without a warning.
# Seen: features timestamp[s] and float64; the values are a datetime and 1.2345678901234568e+22.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
mkdir "$work/data"
for i in 1 2 3; do echo '{"day": "2024-01-01", "number": 12345678901234567890124}'; done > "$work/data/train.jsonl"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/data" <<'PY'
import datetime, sys
from datasets import load_dataset

loaded = load_dataset(sys.argv[1], split="train")
print({name: feature.dtype for name, feature in loaded.features.items()}, loaded[0])
assert loaded.features["day"].dtype == "timestamp[s]" and loaded[0]["day"] == datetime.datetime(2024, 1, 1), "changed"
assert loaded.features["number"].dtype == "float64" and loaded[0]["number"] == 1.2345678901234568e22, "changed"
PY
echo "as described"
