#!/usr/bin/env bash
# transformers 5.23.0: max_grad_norm=0 ("Set to 0 to disable clipping") still multiplies every gradient.
# One expects gradients to reach the optimizer as they are. For its log the Trainer calls clip_grad_norm_ with the
# limit infinity. That reads all gradients once more in each step, and multiplies them by inf / norm, at most 1. If the
# norm overflows float32, which finite gradients of 1e25 do, the factor is NaN, and so is every weight afterwards.
# Seen: two weights with gradients 1e25 and 1. After a step of plain SGD both are finite, after one of the Trainer NaN.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work/out" <<'PY'
import math, sys
import torch
from transformers import Trainer, TrainingArguments

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.steep, self.flat = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": (x * self.steep + self.flat).sum()}

def weights(model):
    return model.steep.item(), model.flat.item()

x = torch.tensor([1e25])
plain = Model()
optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
plain(x)["loss"].backward()
optimizer.step()
trained = Model()
arguments = TrainingArguments(output_dir=sys.argv[1], max_steps=1, learning_rate=1e-3, lr_scheduler_type="constant", optim="sgd",
                              max_grad_norm=0, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
Trainer(trained, arguments, train_dataset=[{"x": x[0]}]).train()
print("plain SGD:", weights(plain), "Trainer:", weights(trained))
assert all(map(math.isfinite, weights(plain))), "changed"
assert all(map(math.isnan, weights(trained))), "the behaviour has changed"
PY
echo "as described"
