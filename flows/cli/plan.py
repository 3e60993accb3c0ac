"""`qrpo plan`: what a run would compute, why, for how long and at which price; loads no Prefect."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from flows.cli.progress_line import progress_line
from qrpo_core.common.errors import QRPOError
from qrpo_core.config import Experiment
from qrpo_core.inspection import memory
from qrpo_core.inspection.expected import total, with_expected
from qrpo_core.inspection.known_rates import KNOWN, KnownDevice
from qrpo_core.inspection.plan import plan as stages_of
from qrpo_core.inspection.plan_text import memory_lines, plan_lines, references_line
from qrpo_core.inspection.pool_report import plan_line
from qrpo_core.inspection.price import Price
from qrpo_core.models.source import without_weights
from qrpo_core.pipeline import policies
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.workspace import Workspace


def plan(experiment: Experiment, options: argparse.Namespace) -> int:
    """Print the plan, or its JSON; returns the exit status. With --probe, measure this machine first."""
    if options.price is not None:
        if not 0 <= options.price < 1e6:
            raise QRPOError(
                f"--price {options.price:g} is not a price", remedy="give that of a GPU for an hour"
            )
        service = experiment.service.model_copy(update={"gpu_hour_price": options.price})
        experiment = experiment.model_copy(update={"service": service})
    device = KNOWN[options.device] if options.device else None
    gpu_memory = _gpu_memory(options, device)
    if options.probe:
        _probe(experiment)
    with without_weights():
        workspace = Workspace(experiment)
        check(workspace, progress_line("checked", "prompts"), runs=False)
        stages = with_expected(workspace, stages_of(workspace), device)
        needed = memory.stage_memory(workspace, stages, gpu_memory)
        memory.refuse_too_large(needed)
        if options.json:
            found = {"stages": [asdict(each) for each in stages], "total": asdict(total(stages))}
            print(json.dumps(found, indent=1))
            return 0
        objects = workspace.objects
        lines = [
            *plan_lines(stages, objects.url, Price.of(experiment), objects.free_bytes()),
            *references_line(experiment),
        ]
        lines += _absent(workspace)
        print("\n".join([*lines, plan_line(workspace), *memory_lines(needed, gpu_memory)]))
    return 0


def _gpu_memory(options: argparse.Namespace, device: KnownDevice | None) -> int | None:
    """Bytes of a GPU of the machine that will run it; None for a machine without one."""
    given = options.gpu_memory
    if given is not None:
        if not 0 < given <= 1_000_000:
            raise QRPOError(
                f"--gpu-memory {given:g} is not a GPU's memory", remedy="give it in GiB, such as 80"
            )
        return int(given * 2**30)
    return memory.visible_gpu_memory() if device is None else device.memory


def _absent(workspace: Workspace) -> list[str]:
    """What this machine lacks of the model, and what the plan says nothing of therefore."""
    lacks = policies.source_of(workspace).lacks
    if not lacks:
        return []
    unchecked = "" if lacks == "weights" else "; prompts are not checked against its tokenizer and template"
    return [
        f"Planned from the model's config.json alone ({workspace.experiment.model.path}): what the store has "
        f"of this model is not seen{unchecked}."
    ]


def _probe(experiment: Experiment) -> None:
    from qrpo_core.inspection.probe import probe

    workspace = Workspace(experiment)
    check(workspace, progress_line("checked", "prompts"))
    try:
        probe(workspace, progress_line("probed", "rows"))
    finally:
        workspace.close()
