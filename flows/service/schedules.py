"""Schedules of deployments, one for each flow of an experiment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.service.submissions import client_of, deployment_of, page
from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.common.hashing import digest_json
from qrpo_core.config import Experiment
from qrpo_core.config.form import whole

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import DeploymentSchedule


@dataclass(frozen=True)
class Scheduled:
    """A schedule. experiment, store : "" for one that the UI made. url : of its deployment."""

    experiment: str
    store: str
    flow: str
    cron: str
    timezone: str
    active: bool
    url: str

    def __str__(self) -> str:
        return (
            f"{self.flow} {self.experiment or '-'}, {self.cron} ({self.timezone}), store {self.store or '-'}"
        )


def schedule_name(experiment: str, store: str) -> str:
    """The slug of the schedule of an experiment: experiments of two stores may have one name."""
    return f"{experiment}-{digest_json(store)[:6]}"


def put_schedule(url: str, flow: str, experiment: Experiment, cron: str, timezone: str) -> str:
    """Make the schedule of an experiment, or change it; returns the address of the deployment's page.

    Raises ConfigError for a bad cron expression or time zone.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    with client_of(url) as client:
        wanted = DeploymentScheduleCreate(
            schedule=_cron(cron, timezone),
            active=True,
            parameters={"experiment": whole(experiment)},
            slug=schedule_name(experiment.name, experiment.store.path),
        )
        deployment = deployment_of(client, flow)
        same = [each for each in deployment.schedules if each.slug == wanted.slug]
        for each in same:
            client.update_deployment_schedule(
                deployment.id, each.id, True, wanted.schedule, parameters=wanted.parameters
            )
        if not same:
            client.create_deployment_schedules(deployment.id, [wanted])
        return page(f"deployments/deployment/{deployment.id}", url)


def change_schedule(
    url: str, flow: str, experiment: str, store: str, *, to: str, among: Iterable[str]
) -> Scheduled:
    """Pause, resume or remove an experiment's schedule (`to`); returns it as it was.

    among : deployments whose schedules the error names. MissingError where there is none.
    """
    slug = schedule_name(experiment, store)
    with client_of(url) as client:
        deployment = deployment_of(client, flow)
        found = [each for each in deployment.schedules if each.slug == slug]
        for each in found:
            if to == "remove":
                client.delete_deployment_schedule(deployment.id, each.id)
            else:
                client.update_deployment_schedule(
                    deployment.id,
                    each.id,
                    active=to == "resume",
                    parameters=each.parameters,  # an update without them empties them (Prefect 3.8)
                )
        if found:
            return _scheduled(found[0], flow, page(f"deployments/deployment/{deployment.id}", url))
    there = schedules(url, among)
    own = [each.flow for each in there if (each.experiment, each.store) == (experiment, store)]
    raise MissingError(
        f"experiment {experiment!r} with store {store} has no schedule of the deployment {flow!r}; there "
        + (f"are: {'; '.join(map(str, there))}" if there else "is none at all"),
        where=url,
        remedy=f"--flow {own[0]}" if own else "name the experiment and the store of one that there is",
    )


def schedules(url: str, flows: Iterable[str]) -> list[Scheduled]:
    """The schedules of these deployments."""
    found = []
    with client_of(url) as client:
        for flow in flows:
            deployment = deployment_of(client, flow)
            place = page(f"deployments/deployment/{deployment.id}", url)
            found += [_scheduled(each, flow, place) for each in deployment.schedules]
    return found


def _scheduled(found: DeploymentSchedule, flow: str, place: str) -> Scheduled:
    form = (found.parameters or {}).get("experiment") or {}
    given = form.get("settings") or {"name": form.get("based_on"), "store": form}
    return Scheduled(
        given.get("name") or "",
        given["store"].get("path") or "",
        flow,
        getattr(found.schedule, "cron", str(found.schedule)),
        getattr(found.schedule, "timezone", None) or "UTC",
        found.active,
        place,
    )


def kept_schedules(client: SyncPrefectClient, flows: Iterable[str]) -> dict[str, list[DeploymentSchedule]]:
    """The schedules with a slug of each deployment that exists: `prefect deploy` deletes them."""
    found = {}
    for flow in flows:
        try:
            found[flow] = [each for each in deployment_of(client, flow).schedules if each.slug]
        except ConfigError:
            continue
    return found


def restore_schedules(client: SyncPrefectClient, kept: dict[str, list[DeploymentSchedule]]) -> int:
    """Make the schedules again that are gone; returns how many."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate

    made = 0
    for flow, before in kept.items():
        deployment = deployment_of(client, flow)
        there = {each.slug for each in deployment.schedules}
        gone = [
            DeploymentScheduleCreate(
                schedule=each.schedule,
                active=each.active,
                parameters=_in_form(each.parameters),
                slug=each.slug,
            )
            for each in before
            if each.slug not in there
        ]
        if gone:
            client.create_deployment_schedules(deployment.id, gone)
        made += len(gone)
    return made


def _in_form(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a schedule; those of older versions had the settings without a form around them."""
    found = dict(parameters or {})
    if "prompts" in found.get("experiment", ()):
        found["experiment"] = {"settings": found["experiment"]}
    return found


def _cron(cron: str, timezone: str) -> Any:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    remedy = "write minute hour day month weekday, such as '0 2 * * *' for every night at two"
    if len(cron.split()) != 5:  # a sixth field is seconds: such a schedule runs every second
        raise ConfigError(f"--cron {cron!r} has not five fields", remedy=remedy)
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        value = cron if field == "cron" else timezone
        raise ConfigError(
            f"--{field} {value!r} is refused", remedy=remedy if field == "cron" else "such as Europe/Zurich"
        ) from None
