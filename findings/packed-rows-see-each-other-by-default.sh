#!/usr/bin/env bash
# transformers 5.23.0: packed sequences are kept apart only with use_cache=False and without an attention mask.
# Positions that start anew mark the sequences of a packed row, and the sdpa and eager masks are built from them, in
# training too. One expects that a key-value cache that nobody reads, or a mask of ones, changes nothing. Each turns
# the detection off without a warning, and use_cache is on by default, in train() as well.
# Seen: how far the second sequence's logits are from those of the sequence alone: 0 to rounding with use_cache=False;
# 0.2 by default, and with use_cache=False and a mask of ones.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).train()
second = torch.tensor([[5, 6, 7]])
row = torch.cat([torch.tensor([[1, 2, 3, 4]]), second], 1)
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
ways = {
    "by default": {},
    "use_cache=False": {"use_cache": False},
    "use_cache=False and a mask of ones": {"use_cache": False, "attention_mask": torch.ones_like(row)},
}
with torch.no_grad():
    alone = model(second).logits
    far = {name: float((model(row, position_ids=positions, **way).logits[:, 4:] - alone).abs().max()) for name, way in ways.items()}
print("from the sequence alone:", far)
assert far["use_cache=False"] < 1e-5, "changed"
assert far["by default"] > 0.01 and far["use_cache=False and a mask of ones"] > 0.01, "changed"
PY
echo "as described"
