#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: LoRA on the embedding of a model whose head is tied to it.
# ensure_weight_tying=True exists to keep embedding and head one matrix. One expects merge_and_unload to add the
# adapter's delta once. It adds the delta twice, since both tied layers carry the adapter and share the weight.
# Seen: the merged matrix moves by 2.000 times the adapter's delta.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, tie_word_embeddings=True)
model = LlamaForCausalLM(config)
before = model.get_input_embeddings().weight.detach().clone()
adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=["embed_tokens"], ensure_weight_tying=True))
for name, weight in adapted.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(weight, std=0.1)
layer = adapted.base_model.model.model.embed_tokens
delta = layer.get_delta_weight("default").detach().clone()
merged = adapted.merge_and_unload()
moved = merged.get_input_embeddings().weight.detach() - before
ratio = float((moved * delta).sum() / (delta * delta).sum())
print(f"the merged matrix moved by {ratio:.3f} times the adapter's delta")
assert abs(ratio - 2) < 1e-3, "the behaviour has changed"
PY
echo "as described"
