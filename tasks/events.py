"""What a run tells the server, for automations to start the next one."""

from __future__ import annotations

from prefect.events import emit_event

from qrpo_core.config import Experiment

#: Told when the training set is in the store, and when the policy is.
PRECOMPUTED, TRAINED = "qrpo.precomputed", "qrpo.trained"


def tell(event: str, experiment: Experiment, then: str) -> None:
    """Emit an event about an experiment; its payload is what the next run needs as parameters.

    then : what is asked to follow; a label of the resource, so that a trigger can match it.
    """
    emit_event(
        event,
        resource={
            "prefect.resource.id": f"qrpo.experiment.{experiment.name}",
            "prefect.resource.name": experiment.name,
            "qrpo.then": then,
        },
        payload={"experiment": experiment.model_dump(mode="json"), "then": then},
    )
