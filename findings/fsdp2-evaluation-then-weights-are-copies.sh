#!/usr/bin/env bash
# torch 2.13.0: after a forward under no_grad, the root's own parameters of an FSDP2 model are gathered copies.
# fully_shard keeps the root gathered for the backward that usually follows, as its documentation says. After an
# evaluation none follows. One expects model.parameters() to be the weights. For the root's own group they are copies
# that the next backward drops: an optimizer made then trains the other layers alone, and a change in place is lost.
# There is no error. What is right: fully_shard(model, reshard_after_forward=True), or model.reshard().
# Seen: the largest change of the root's own weight by a step of SGD is 0 if a forward under no_grad came before the
# optimizer, and above 0 if none came, or with reshard_after_forward=True.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - "$work/rendezvous" <<'PY'
import sys
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = torch.distributed.init_device_mesh("cpu", (1,))
data = torch.ones(1, 4)

def changes(evaluated, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh, **options)
    before = {name: weight.full_tensor().clone() for name, weight in model.state_dict().items()}
    if evaluated:
        with torch.no_grad():
            model(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(data).sum().backward()
    optimizer.step()
    after = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    return {name: round(float((after[name] - before[name]).abs().max()), 3) for name in ("0.weight", "1.weight")}

found = {
    "no evaluation": changes(False),
    "evaluation": changes(True),
    "evaluation, reshard_after_forward=True": changes(True, reshard_after_forward=True),
}
for name, change in found.items():
    print(f"{name}: {change}")
torch.distributed.destroy_process_group()
assert found["no evaluation"] == found["evaluation, reshard_after_forward=True"], "changed"
assert found["no evaluation"]["1.weight"] > 0, "changed"
assert found["evaluation"]["1.weight"] == 0 and found["evaluation"]["0.weight"] > 0, "changed"
PY
echo "as described"
