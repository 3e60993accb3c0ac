#!/usr/bin/env bash
# transformers 5.23.0: Qwen2-MoE and Phi-MoE do not tell their attention function the sliding window.
# An attention function is called with keywords; a flash kernel takes the window from sliding_window, since it gets no
# mask. One expects every model with a window to pass it, as Qwen2 and Mixtral do. These two put it in the mask of sdpa
# and eager alone, so a function that builds its own mask attends to everything. StableLM passes no keyword of the
# caller's on at all, so the cu_seq_lens of packed rows are lost too.
# Seen: the keywords that a registered attention function gets, of configurations with a window of 4.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from transformers import (AttentionInterface, AutoModelForCausalLM, MixtralConfig, PhimoeConfig, Qwen2Config,
                          Qwen2MoeConfig, StableLmConfig)

got = {}

def attention(module, query, key, value, attention_mask, **keywords):
    got.update(keywords)
    shared = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None

AttentionInterface.register("mine", attention)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2}
window = {"sliding_window": 4}
qwen = {**window, "use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"]}
experts = {"num_experts_per_tok": 1}
configs = {
    "Qwen2": Qwen2Config(**sizes, **qwen),
    "Mixtral": MixtralConfig(**sizes, **window, **experts, num_local_experts=2),
    "Qwen2-MoE": Qwen2MoeConfig(**sizes, **qwen, **experts, num_experts=2, moe_intermediate_size=32,
                                shared_expert_intermediate_size=32),
    "Phi-MoE": PhimoeConfig(**sizes, **window, num_experts_per_tok=2, num_local_experts=2),
    "StableLM": StableLmConfig(**sizes),
}
ids, ends = torch.arange(12)[None], torch.tensor([0, 12], dtype=torch.int32)
seen = {}
for name, config in configs.items():
    got.clear()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="mine")
    with torch.no_grad():
        model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    seen[name] = got.get("sliding_window"), "cu_seq_lens_q" in got
    print(f"{name}: sliding_window {seen[name][0]}, cu_seq_lens_q {'passed' if seen[name][1] else 'lost'}")
assert seen["Qwen2"] == seen["Mixtral"] == (4, True), "changed"
assert seen["Qwen2-MoE"] == seen["Phi-MoE"] == (None, True), "changed"
assert not seen["StableLM"][1], "changed"
PY
echo "as described"
