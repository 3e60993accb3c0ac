#!/usr/bin/env bash
# prefect 3.8.8: two tasks that return dictionaries with the same keys are both recorded as inputs of the task that
# takes one of the two. Inputs are found by the identity of the objects inside an argument, keys included, and
# Python keeps one object for equal literal texts. One expects an arrow from the task whose result was passed, and
# from no other: the run graph shows one from each.
# Seen: the consumer of the first task's dictionary has two parents; the consumer of its text has one.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet prefect==3.8.8 'fastapi<0.151' 'sqlalchemy<2.1'
export PREFECT_HOME="$work/home" PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 PREFECT_LOGGING_LEVEL=ERROR
"$work/venv/bin/python" - <<'PY'
from prefect import flow, task
from prefect.context import TaskRunContext
from prefect.testing.utilities import prefect_test_harness


@task
def as_dictionary(name: str) -> dict[str, str]:
    return {"made": f"by {name}"}


@task
def as_text(name: str) -> str:
    return f"made by {name}"


@task
def parents_of(value: object) -> int:
    return len({str(each.id) for each in TaskRunContext.get().task_run.task_inputs["value"]})


@flow
def parents(dictionaries: bool) -> int:
    make = as_dictionary if dictionaries else as_text
    first, second = make("the first"), make("the second")
    assert first != second
    return parents_of(first)


with prefect_test_harness(server_startup_timeout=120):
    texts, dictionaries = parents(False), parents(True)
print("parents of the consumer of one of two texts:", texts)
print("parents of the consumer of one of two dictionaries with the same key:", dictionaries)
if (texts, dictionaries) != (1, 2):
    raise SystemExit("the behaviour has changed")
PY
echo "as described"
