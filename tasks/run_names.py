"""Names of flow runs: which flow, experiment, model, data and budget, and how a policy is trained, such as

    align demo · SmolLM2-135M-Instruct.Q4_1 · template ×176 · n=5 · qrpo beta=0.1 lr=1e-05
    compare demo · SmolLM2-135M-Instruct.Q4_1 · template ×176 · n=5 · objective.beta=0.1,0.3

Names are public in the UI, so they contain no path, and of an address only the last part.
"""

from __future__ import annotations

import re
from typing import Any

from prefect import runtime

from qrpo_core.config import Experiment, ModelConfig, PromptsConfig
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.objective_kinds import KINDS

#: Longest part of a name. Longer ones lose their middle, since names differ at the ends.
_LONGEST = 40
#: How the names of runs begin that train a policy or evaluate one.
_OF_A_POLICY = ("align", "train", "round", "evaluate")


def run_name() -> str:
    """Name of the flow run that is starting: `flow_run_name` of every flow with a parameter `experiment`.

    The run of a round has the number of the round in it.
    """
    parameters: dict[str, Any] = dict(runtime.flow_run.parameters)
    experiment, flow = parameters.get("experiment"), str(runtime.flow_run.flow_name)
    if not isinstance(experiment, Experiment):  # a run with invalid parameters ends before its name matters
        return flow
    if (number := parameters.get("number")) is not None:
        flow = f"{flow} {number} of {experiment.rounds.count}"
    return named(flow, experiment, parameters.get("comparison"))


def named(flow: str, experiment: Experiment, comparison: ComparisonConfig | None = None) -> str:
    """The name of a run of a flow. comparison : what varies, of a run of `compare`."""
    parts = [f"{flow} {experiment.name}", *facts(experiment)]
    if flow.startswith(_OF_A_POLICY):
        parts.append(objective_name(experiment))
    if comparison is not None:
        parts += map(_short, (*comparison.vary, *comparison.variants))
    return " · ".join(parts)


def facts(experiment: Experiment) -> tuple[str, str, str]:
    """Model, data and budget in short: ("SmolLM2-135M", "prompts.jsonl ×64", "n=8")."""
    count = experiment.sampling.references_per_prompt
    return model_name(experiment.model), data_name(experiment.prompts), f"n={count}"


def objective_name(experiment: Experiment) -> str:
    """The objective with its beta, if it has one, and the learning rate: "qrpo beta=0.1 lr=1e-06"."""
    objective, rate = experiment.objective, f"lr={experiment.training.learning_rate:g}"
    beta = [f"beta={objective.beta:g}"] if "beta" in KINDS[objective.kind].takes() else []
    return " ".join((objective.kind, *beta, rate))


def model_name(model: ModelConfig) -> str:
    """Last part of a folder, hub id or file, without `.gguf`; of a hub revision its first seven letters."""
    name = _last_part(model.path, "model").removesuffix(".gguf")
    revision = f"@{_short(model.revision)[:7]}" if model.revision else ""
    return _short(name) + revision


def data_name(prompts: PromptsConfig) -> str:
    """The file, data set, task or kind, with the number of prompts where the experiment sets one."""
    name = {
        "template": "template",
        "reasoning_gym": prompts.task,
        "file": _last_part(prompts.path or "", "file"),
        "hub": _last_part(prompts.name or "", "hub"),
    }[prompts.kind]
    counts = [count for count in (prompts.size, prompts.limit) if count is not None]
    return _short(str(name)) + (f" ×{min(counts):,}" if counts else "")


def _last_part(path: str, otherwise: str) -> str:
    """The part after the last slash, without the query, user and password of an address."""
    path = re.sub(r"[?#].*", "", path, flags=re.DOTALL) if "://" in path else path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].rpartition("@")[2].strip(". ") or otherwise


def _short(text: str) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    kept = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:kept]}…{text[-kept:]}"
