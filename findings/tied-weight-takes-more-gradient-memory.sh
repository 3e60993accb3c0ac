#!/usr/bin/env bash
# torch 2.13.0: a head that is tied to its embedding needs more memory for gradients than one that is not.
# Tying saves a matrix, so one expects it to save a gradient. The head's gradient waits until the embedding's is there,
# and the two are added out of place: three fresh matrices at once, four with the gradient that microbatches accumulate
# in. Without tying it is one fresh matrix at a time, and two that are kept.
# Seen: the most memory at once of forward and backward, in matrices, from the profiler: tied 3 in the first microbatch
# and 1 + 3 in the second; untied 2, and 2 + 1.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - "$work/trace.json" <<'PY'
import json, sys
import torch
from torch.profiler import ProfilerActivity, profile

VOCABULARY, WIDTH = 4096, 256
MATRIX = 4 * VOCABULARY * WIDTH

def fresh(tied):
    embedding, head = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    if tied:
        head.weight = embedding.weight
    peaks = []
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            head(embedding(torch.arange(4)[None])).square().mean().backward()
        seen.export_chrome_trace(sys.argv[1])
        events = json.load(open(sys.argv[1]))["traceEvents"]
        events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
        now = most = 0
        for event in events:
            now += event["args"]["Bytes"]
            most = max(most, now)
        peaks.append(round(most / MATRIX))
    return peaks

tied, untied = fresh(True), fresh(False)
print("matrices allocated at once in the first and second microbatch: tied", tied, "untied", untied)
print("with what is kept of the first microbatch:", "tied", 1 + tied[1], "untied", 2 + untied[1])
assert tied == [3, 3] and untied == [2, 1], "the behaviour has changed"
PY
echo "as described"
