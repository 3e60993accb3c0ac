#!/usr/bin/env bash
# prefect 3.8.8: a schedule of a deployment that has parameters of its own loses them when it is paused. One expects a
# request that changes `active` alone to leave the rest as it was: the server's route is a PATCH, and the client sends
# only what was given. The route fills in what was not given with the defaults of a new schedule: no parameters.
# Seen: {"size": 3} before; {} after update_deployment_schedule(..., active=False); kept if the parameters are sent too.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet prefect==3.8.8 'fastapi<0.151' 'sqlalchemy<2.1'
export PREFECT_HOME="$work/home" PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 PREFECT_LOGGING_LEVEL=ERROR
"$work/venv/bin/python" - <<'PY'
from prefect import flow, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.testing.utilities import prefect_test_harness


@flow
def count(size: int = 1) -> int:
    return size


with prefect_test_harness(server_startup_timeout=120), get_client(sync_client=True) as client:
    deployment = client.create_deployment(client.create_flow(count), name="daily")
    daily = CronSchedule(cron="0 6 * * *")
    wanted = DeploymentScheduleCreate(schedule=daily, parameters={"size": 3})
    (made,) = client.create_deployment_schedules(deployment, [wanted])

    def parameters() -> dict:
        (found,) = client.read_deployment_schedules(deployment)
        return found.parameters

    before = parameters()
    client.update_deployment_schedule(deployment, made.id, active=True, parameters={"size": 3})
    sent = parameters()
    client.update_deployment_schedule(deployment, made.id, active=False)
    paused = parameters()
print("at first:", before)
print("after an update that sends them:", sent)
print("after a pause:", paused)
if (before, sent, paused) != ({"size": 3}, {"size": 3}, {}):
    raise SystemExit("the behaviour has changed")
PY
echo "as described"
