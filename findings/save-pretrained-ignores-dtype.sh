#!/usr/bin/env bash
# transformers 5.23.0: save_pretrained(dtype=torch.bfloat16) writes float32 weights and says nothing.
# from_pretrained has a dtype argument, so one expects its counterpart to have one. The keyword is swallowed by
# **kwargs. What is right: model.to(torch.bfloat16).save_pretrained(folder).
# Seen: the saved tensors are F32 and config.json says float32, with no error and no warning.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/model" <<'PY'
import json, sys, warnings
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    LlamaForCausalLM(config).save_pretrained(folder, dtype=torch.bfloat16)
with safe_open(f"{folder}/model.safetensors", "pt") as file:
    dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}
said = json.load(open(f"{folder}/config.json"))["dtype"]
print("asked for bfloat16; weights:", dtypes, "config.json:", said, "warnings about dtype:", [str(w.message) for w in told if "dtype" in str(w.message)])
assert dtypes == {"F32"} and said == "float32", "the behaviour has changed"
assert not any("dtype" in str(w.message) for w in told), "it warns now"
PY
echo "as described"
