#!/usr/bin/env bash
# torch 2.13.0: Optimizer.load_state_dict rounds an optimizer's float32 state to the dtype of a bfloat16 parameter.
# An optimizer that keeps float32 momenta of bfloat16 parameters saves them as float32. One expects to get back what
# was saved, so that a resumed training goes on as if it had not stopped. Loading casts everything of floating point
# except "step", and says nothing. The documentation does not mention it.
# Seen: the momentum is float32 before and in the saved state, bfloat16 after loading, and its value has changed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PY'
import warnings
import torch

class Momentum(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            kept = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter, dtype=torch.float32))
            kept.mul_(0.9).add_(parameter.grad.float())
            parameter.sub_(0.1 * kept)

parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
before, after = Momentum([parameter]), Momentum([parameter])
for gradient in (1.0, 0.3, 0.01):
    parameter.grad = torch.full_like(parameter, gradient)
    before.step()
saved = before.state_dict()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    after.load_state_dict(saved)
found = {
    "in use": before.state[parameter]["momentum"],
    "saved": saved["state"][0]["momentum"],
    "loaded": after.state[parameter]["momentum"],
}
for name, momentum in found.items():
    print(name, momentum.dtype, momentum.item())
assert found["in use"].dtype == found["saved"].dtype == torch.float32, "changed"
assert found["loaded"].dtype == torch.bfloat16 and found["loaded"].item() != found["saved"].item(), "changed"
PY
echo "as described"
