"""The model card of a policy that is shared: what model hubs read, the evaluation, and no path or address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from qrpo_core import __version__
from qrpo_core.config import Experiment
from qrpo_core.evaluation.benchmarks import BenchmarkResult
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.reporting.benchmarks import benchmark_rows
from qrpo_core.reporting.objective_names import OBJECTIVE_NAMES
from qrpo_core.reporting.summary import outcome, summary_rows
from qrpo_core.training.survival import survival_text

#: The sections whose settings the card shows. Others name places: files, stores, judges.
_SHOWN = ("sampling", "training_data", "objective", "training", "rounds")
#: Fields of these that may hold a path.
_PLACES = ("deepspeed",)


@dataclass(frozen=True)
class SharedPolicy:
    """What the card says.

    model : how others name the policy. base_model : its hub id; None if it has none. license : hub's name.
    data_set : hub id of the prompts; None if they are not there. saved : facts of the training's survival.
    """

    model: str
    base_model: str | None
    license: str
    data_set: str | None
    experiment: Experiment
    result: EvaluationResult
    benchmarks: Mapping[str, BenchmarkResult]
    saved: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.model.rpartition("/")[2]


def hub_card(policy: SharedPolicy) -> str:
    """The card in Markdown, with a front matter that the hub accepts."""
    experiment = policy.experiment
    kind = OBJECTIVE_NAMES[experiment.objective.kind]
    front = ModelCardData(
        base_model=policy.base_model,
        datasets=[policy.data_set] if policy.data_set else None,
        license=policy.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qrpo", experiment.objective.kind],
        model_name=policy.name,
        eval_results=list(_metrics(policy)),
    )
    rows = [*summary_rows(policy.result), *benchmark_rows(policy.benchmarks)]
    table = "\n".join(f"| {_cell(label)} | {_cell(value)} |" for label, value in rows)
    base = f" from `{policy.base_model}`" if policy.base_model else ""
    return f"""---
{front.to_yaml()}
---
# {policy.name}

Fine-tuned{base} with {kind} by the package qrpo {__version__}.
Saved in {policy.saved["dtype"]}: {survival_text(policy.saved)}.

```python
{_snippet(policy)}```

## Evaluation

{outcome(policy.result)}

| before → after training | |
|---|---|
{table}

## Training

Reward: {_reward(experiment)}. Settings that differ from the defaults:

```yaml
{_settings(experiment)}```
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _metrics(policy: SharedPolicy) -> Iterator[EvalResult]:
    """The results of the trained policy for the front matter, whose plain numbers hubs compare."""
    result = policy.result
    held_out = ("held-out", "held-out prompts")
    yield _metric(held_out, "reward", "Mean reward", result.after.reward.value)
    yield _metric(held_out, "win_rate", "Win rate against the reference", result.win_rate.value)
    yield _metric(held_out, "kl", "KL(policy || reference), nats", result.kl.value)
    for name, judged in result.judges.items():
        yield _metric(held_out, f"judge_{name}", f"Mean score of judge {name}", judged.after.value)
    for name, tested in policy.benchmarks.items():
        yield _metric((name, name), "reward", "Mean reward", tested.after.reward.value)
        if tested.solved_after is not None:
            yield _metric((name, name), "solved", "Share with the full reward", tested.solved_after.value)
        for metric, value in tested.alpaca_eval.get("after", {}).items():
            if metric.endswith("rate"):
                yield _metric((name, name), metric, f"{metric}, %", value)


def _metric(data: tuple[str, str], kind: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=data[0],
        dataset_name=data[1],
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 6),
    )


def _snippet(policy: SharedPolicy) -> str:
    """A use of the policy at the temperature at which it is the policy that was trained."""
    sampling, temperature = policy.experiment.sampling, policy.experiment.training_temperature
    return f"""from transformers import pipeline

chat = pipeline("text-generation", model="{policy.model}")
messages = [{{"role": "user", "content": "Hello!"}}]
settings = dict(do_sample=True, temperature={temperature:g}, max_new_tokens={sampling.max_new_tokens})
print(chat(messages, **settings)[0]["generated_text"][-1]["content"])
"""


def _reward(experiment: Experiment) -> str:
    kinds = [experiment.reward.kind]
    if experiment.reward.kind == "weighted":
        kinds += [term.reward.kind for term in experiment.reward.terms]
    return ", ".join(f"`{kind}`" for kind in kinds)


def _settings(experiment: Experiment) -> str:
    found = experiment.model_dump(mode="json", exclude_defaults=True, include=set(_SHOWN))
    for section in found.values():
        for place in _PLACES:
            section.pop(place, None)
    ordered = {name: found[name] for name in _SHOWN if found.get(name)}
    return yaml.safe_dump(ordered, sort_keys=False) if ordered else "{}\n"
