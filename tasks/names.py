"""Names of flow runs: which flow, experiment, model, data and budget, such as

    align demo · SmolLM2-135M-Instruct.Q4_1 · template ×176 · n=5

No path is in a name and nothing of an address but its last part: names are shown wherever a run is.
"""

from __future__ import annotations

import re
from typing import Any

from prefect import runtime

from qrpo_core.config import Experiment, ModelConfig, PromptsConfig

#: Longest part of a name; what is longer is cut in its middle, since ends tell names apart.
_LONGEST = 40


def run_name() -> str:
    """Name of the flow run that is starting: `flow_run_name` of every flow with a parameter `experiment`.

    A run of a part (a round, a share) has the part in it, from its other parameters.
    """
    parameters: dict[str, Any] = dict(runtime.flow_run.parameters)
    experiment, flow = parameters.get("experiment"), str(runtime.flow_run.flow_name)
    if not isinstance(
        experiment, Experiment
    ):  # a run whose parameters are refused ends before its name counts
        return flow
    if (number := parameters.get("number")) is not None:
        flow = f"{flow} {number} of {experiment.rounds.count}"
    return " · ".join((f"{flow} {experiment.name}", *facts(experiment)))


def facts(experiment: Experiment) -> tuple[str, str, str]:
    """Model, data and budget in short: ("SmolLM2-135M", "prompts.jsonl ×64", "n=8")."""
    count = experiment.sampling.references_per_prompt
    return model_name(experiment.model), data_name(experiment.prompts), f"n={count}"


def model_name(model: ModelConfig) -> str:
    """Last part of a folder, hub id or file, without `.gguf`; of a hub revision its first seven letters."""
    name = _last_part(model.path, "model").removesuffix(".gguf")
    revision = f"@{_short(model.revision)[:7]}" if model.revision else ""
    return _short(name) + revision


def data_name(prompts: PromptsConfig) -> str:
    """The file, data set, task or kind, and how many prompts it gives where the experiment says that."""
    name = {
        "template": "template",
        "reasoning_gym": prompts.task,
        "file": _last_part(prompts.path or "", "file"),
        "hub": _last_part(prompts.name or "", "hub"),
    }[prompts.kind]
    counts = [count for count in (prompts.size, prompts.limit) if count is not None]
    return _short(str(name)) + (f" ×{min(counts):,}" if counts else "")


def _last_part(path: str, otherwise: str) -> str:
    """What stands behind the last slash; neither the query of an address nor its user and password."""
    path = re.sub(r"[?#].*", "", path, flags=re.DOTALL) if "://" in path else path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].rpartition("@")[2].strip(". ") or otherwise


def _short(text: str) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    kept = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:kept]}…{text[-kept:]}"
