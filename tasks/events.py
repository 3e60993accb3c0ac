"""Events with which a run starts the next deployment."""

from __future__ import annotations

from prefect import events

from qrpo_core.config import Experiment
from qrpo_core.config.form import whole

#: Emitted when the training set is in the store, and when the policy is.
PRECOMPUTED, TRAINED = "qrpo.precomputed", "qrpo.trained"


def emit_event(event: str, experiment: Experiment, then: str) -> None:
    """Emit an event about an experiment. Its payload holds the parameters of the next run.

    then : the deployments that should follow; a label of the resource, which their triggers match.
    """
    events.emit_event(
        event,
        resource={
            "prefect.resource.id": f"qrpo.experiment.{experiment.name}",
            "prefect.resource.name": experiment.name,
            "qrpo.then": then,
        },
        payload={"experiment": whole(experiment), "then": then},
    )
