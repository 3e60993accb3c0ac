"""The parameter `experiment` of a deployed flow: an experiment, or the short form of one.

Prefect derives a deployment's form from the type of the parameter, and validates what a run gets by it. So
the form is short, the flow always gets an experiment, and a preset is read when the run starts.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

from qrpo_core.config import Experiment
from qrpo_core.config.form import ExperimentForm
from qrpo_core.pipeline.presets import experiment_of_form


def _experiment(given: Any) -> Any:
    return experiment_of_form(given) if isinstance(given, dict) else given


FormExperiment: TypeAlias = Annotated[
    Experiment, BeforeValidator(_experiment, json_schema_input_type=ExperimentForm)
]
