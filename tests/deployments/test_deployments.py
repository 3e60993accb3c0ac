"""Deployments on a real server, and runs of them by a real process worker."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.service import deploy as module
from flows.service.deploy import POOLS, ROOT, create_pools, enter_checkout, service_url
from flows.service.server import PrefectServer
from flows.service.submissions import DEPLOYMENTS
from flows.service.workers import LIMITS, _children
from qrpo_core.common.errors import ConfigError, QRPOError
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline import preflight
from qrpo_core.pipeline.presets import save
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.backends.opening import open_objects
from tasks import stages
from tests.deployments.api import ask, end, references, said, start, submit_form

#: Of the 20 prompts of `settings`: the others are held out, by the hash of each.
TRAINED_ON = 15
#: Name (of the flow and of the deployment), entrypoint, work pool, tags.
EXPECTED = {
    "align": ("flows/align.py:align", "gpu", {"qrpo", "sampling", "training", "evaluation"}),
    "precompute": ("flows/precompute.py:precompute", "cpu", {"qrpo", "sampling"}),
    "sample-shard": ("flows/shards.py:sample_shard", "gpu", {"qrpo", "sampling", "shard"}),
    "annotate-shard": ("flows/shards.py:annotate_shard", "gpu", {"qrpo", "reward", "shard"}),
    "train": ("flows/train.py:train", "gpu", {"qrpo", "training"}),
    "evaluate": ("flows/evaluate.py:evaluate", "gpu", {"qrpo", "sampling", "evaluation"}),
    "compare": ("flows/compare.py:compare", "gpu", {"qrpo", "sampling", "training", "evaluation"}),
    "pool-report": ("flows/pool_report.py:pool_report", "gpu", {"qrpo", "reward"}),
    "top-up": ("flows/top_up.py:top_up", "gpu", {"qrpo", "sampling", "nightly"}),
}

#: Fields whose title, with the choices and limits that the schema has, is description enough.
SPEAK_FOR_THEMSELVES = {
    "Experiment.name",
    "EvaluationConfig.seed",
    "PromptsConfig.kind",
    "RewardConfig.kind",
    "WeightedTerm.weight",
    *(f"TrainingConfig.{f}" for f in ("epochs", "learning_rate", "schedule", "warmup_ratio", "weight_decay")),
}


@pytest.mark.slow
def test_what_the_command_puts_on_the_server(server: PrefectServer, deployed: str) -> None:
    assert [line for line in deployed.splitlines() if line.startswith("Work pool")] == [
        "Work pool cpu created.",
        "Work pool gpu created.",
    ]
    found = {d["name"]: d for d in ask(server, "POST", "/deployments/filter")}
    assert set(found) == set(EXPECTED)
    for name, (entrypoint, pool, tags) in EXPECTED.items():
        deployment = found[name]
        assert deployment["entrypoint"] == entrypoint
        assert set(deployment["tags"]) == tags
        assert deployment["work_pool_name"] == pool
        assert not deployment["paused"]
        assert deployment["enforce_parameter_schema"]
        assert len(deployment["description"]) > 40
        # The form begins with the demo; nobody starts a shard by hand.
        more = {
            "precompute": {"pool": "gpu"},
            "compare": {"comparison": {"vary": ["objective.beta=0.1,0.3"]}},
        }.get(name, {})
        wanted = {} if "shard" in tags else {"experiment": {"based_on": "experiments/demo.yaml"}, **more}
        assert deployment["parameters"] == wanted
        # No path of this machine: any worker has its own checkout.
        assert deployment["pull_steps"] == [
            {"flows.service.deploy.enter_checkout": {}},
            {"flows.service.end_with_worker.end_with_worker": {}},
        ]
        assert str(ROOT) not in str({**deployment, "parameter_openapi_schema": None})
        assert deployment["schedules"] == []
    assert ask(server, "POST", "/flow_runs/filter") == []  # nothing is scheduled


@pytest.mark.slow
def test_a_second_time_changes_nothing(
    server: PrefectServer, deployed: str, deploy: Callable[[], str]
) -> None:
    def standing() -> Any:
        pools = ask(server, "POST", "/work_pools/filter")
        found = ask(server, "POST", "/deployments/filter")
        kept = ("id", "parameters", "tags", "entrypoint", "description", "parameter_openapi_schema")
        return {p["name"]: p["id"] for p in pools}, {d["name"]: {k: d[k] for k in kept} for d in found}

    before = standing()
    assert "created." not in deploy()
    assert standing() == before


@pytest.mark.slow
def test_deployments_for_another_store_stand_beside_the_others(
    server: PrefectServer, deployed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    before = {d["name"]: d["id"] for d in ask(server, "POST", "/deployments/filter")}
    assert module.main(["team", "s3://bucket/team"]) == 0
    found = {d["name"]: d for d in ask(server, "POST", "/deployments/filter")}
    assert {name: d["id"] for name, d in found.items() if name in before} == before
    assert set(found) - set(before) == {f"{name}-team" for name in DEPLOYMENTS}
    for name in DEPLOYMENTS:
        own, plain = found[f"{name}-team"], found[name]
        form = {"based_on": "experiments/demo.yaml", "store": "s3://bucket/team"}
        assert own["parameters"] == {**plain["parameters"], "experiment": form}
        assert own["flow_id"] == plain["flow_id"]
        assert own["description"].startswith("Store: s3://bucket/team.")
        assert set(own["tags"]) == {*plain["tags"], "team"}
    for each in set(found) - set(before):  # the other tests count them
        ask(server, "DELETE", f"/deployments/{found[each]['id']}")


@pytest.mark.parametrize("given", [("team",), ("a b", "s3://x"), ("team", "s3://x", "more"), ("../x", "s")])
def test_a_name_without_a_store_is_refused(given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="make deploy NAME=team STORE="):
        module.main(given)


@pytest.mark.slow
def test_a_pool_of_another_type_is_refused(server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(server, "POST", "/work_pools/", name="elsewhere", type="docker")
    monkeypatch.setattr(module, "POOLS", {"elsewhere": ""})
    with pytest.raises(QRPOError, match=r"work pool 'elsewhere' has type 'docker'.*rename"):
        create_pools(server.url)


@pytest.mark.slow
def test_every_field_of_the_form_explains_itself(server: PrefectServer, deployed: str) -> None:
    found = ask(server, "GET", "/deployments/name/align/align")
    schema = found["parameter_openapi_schema"]
    assert schema["required"] == ["experiment"]
    definitions = schema["definitions"]
    reached, silent = set(), set()
    for name, section in definitions.items():
        assert section["description"], name
        for field, properties in section["properties"].items():
            if not {"description", "$ref"} & set(properties):  # what a $ref leads to has a description
                silent.add(f"{name}.{field}")
            reached |= {r for r in definitions if f"'#/definitions/{r}'" in str(properties)}
    assert silent <= SPEAK_FOR_THEMSELVES
    assert reached == set(definitions) - {"ExperimentForm"}  # no reference leads nowhere
    form = sorted(definitions["ExperimentForm"]["properties"].values(), key=lambda field: field["position"])
    assert [field["title"] for field in form] == [
        "based_on",
        "store.path",
        "model.path",
        "prompts.path",
        "sampling.references_per_prompt",
        "reward.kind",
        "objective.kind",
        "objective.beta",
        "training.learning_rate",
        "overrides",
        "settings",
    ]
    kinds = definitions["RewardConfig"]["properties"]["kind"]["enum"]
    assert {"sentiment", "judge", "code", "weighted"} <= set(kinds)
    assert definitions["SamplingConfig"]["properties"]["references_per_prompt"]["default"] == 8


@pytest.mark.slow
def test_a_run_with_a_raised_budget_draws_the_difference(
    server: PrefectServer, workers: Path, settings: dict[str, Any]
) -> None:
    from flows.precompute import precompute

    precompute(Experiment.model_validate(settings))  # as `qrpo run` does
    assert references(Experiment.model_validate(settings)) == {4: TRAINED_ON}

    place = settings["store"]["path"]
    save(open_objects(StoreConfig(path=place)), Experiment.model_validate(settings))
    form = {"based_on": settings["name"], "store": place, "references": 6}
    run = submit_form(server, "precompute", form, pool=None)
    found = end(server, run, workers)
    settings["sampling"]["references_per_prompt"] = 6
    assert found["state"]["type"] == "COMPLETED", workers.read_text()
    assert found["name"].startswith("precompute small · ")
    assert references(Experiment.model_validate(settings)) == {6: TRAINED_ON}
    computed, reused = 2 * TRAINED_ON, 4 * TRAINED_ON
    for stage in ("sample references", "annotate references", "score reference log-probs"):
        said(server, run, rf" {stage} +{computed} rows computed, {reused} reused \(")
    said(server, run, r" prompts +cached, 1 artifact reused \(")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        (
            "sampling",
            "references_per_prompt",
            1,
            "Flow run encountered an exception: ConfigError: sampling.references_per_prompt = 1 is too few "
            "[training_data.mode 'random', objective.kind 'qrpo']: set it to 2 or more "
            "(transform 'identity', and each is left out of its own comparison)",
        ),
        (
            "reward",
            "max_words",
            None,
            "Validation of flow parameters failed with error: ConfigError: reward.max_words is missing; "
            "kind 'length' needs it [settings of the form]",
        ),
    ],
)
def test_a_wrong_value_is_told_in_the_state_and_writes_nothing(
    server: PrefectServer,
    workers: Path,
    settings: dict[str, Any],
    section: str,
    field: str,
    value: Any,
    message: str,
) -> None:
    settings[section][field] = value
    run = start(server, "precompute", settings, pool=None)
    state = end(server, run, workers)["state"]
    assert (state["type"], state["message"]) == ("FAILED", message)
    assert not Path(settings["store"]["path"]).exists()


@pytest.mark.slow
def test_a_value_that_the_form_would_refuse_is_refused_by_the_server(
    server: PrefectServer, deployed: str, settings: dict[str, Any]
) -> None:
    settings["sampling"]["references_per_prompt"] = 0
    before = ask(server, "POST", "/flow_runs/count")
    with pytest.raises(AssertionError, match=r"0 is less than the minimum of 1"):
        start(server, "precompute", settings, pool=None)
    assert ask(server, "POST", "/flow_runs/count") == before


@pytest.mark.slow
def test_a_worker_of_each_pool_is_online(server: PrefectServer, workers: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        online = {
            pool: [w["status"] for w in ask(server, "POST", f"/work_pools/{pool}/workers/filter")]
            for pool in POOLS
        }
        if all(online.values()):
            break
        time.sleep(0.3)
    assert online == {"cpu": ["ONLINE"], "gpu": ["ONLINE"]}, workers.read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the children of a process")
@pytest.mark.long
def test_ctrl_c_ends_the_workers_and_the_record_says_that_of_their_run(
    server: PrefectServer, working: tuple[Any, Path], workers: Path, settings: dict[str, Any]
) -> None:
    settings["reward"] = {"kind": "python", "python": {"function": "endless:score"}}
    run = start(server, "precompute", settings, pool=None)
    said(server, run, "check rows +[0-9]+ artifact computed", seconds=600)  # next: a reward without end
    started, _ = working
    children = set(_children(started.pid))
    grandchildren = {run for worker in children for run in _children(worker)}
    assert len(children) == len(POOLS)
    assert grandchildren
    os.killpg(started.pid, signal.SIGINT)  # what a terminal does
    assert started.wait(300) == 0, workers.read_text()
    assert not [pid for pid in children | grandchildren if Path(f"/proc/{pid}").exists()]
    assert end(server, run, workers, seconds=60)["state"]["type"] == "CRASHED"


@pytest.mark.slow
def test_preflight_is_once_a_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def check(workspace: Workspace) -> None:
        looked.append(workspace.experiment.sampling.references_per_prompt)
        preflight.check(workspace)

    monkeypatch.setattr(stages, "check", check)
    for budget, passed_before in ((4, False), (5, True), (6, False)):
        settings["sampling"]["references_per_prompt"] = budget
        experiment = Experiment.model_validate(settings)
        if passed_before:
            stages.skip_preflight(experiment)  # `qrpo run` has checked it
        assert stages.workspace_of(experiment) is stages.workspace_of(experiment)
    assert looked == [4, 6]


def test_every_pool_has_a_limit_or_none() -> None:
    assert set(LIMITS) == set(POOLS)
    assert LIMITS["gpu"] == 1


def test_no_server_is_a_clear_refusal() -> None:
    from prefect.settings import temporary_settings

    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    with (
        temporary_settings({"api.url": url}),
        pytest.raises(QRPOError, match=rf"no Prefect server answers at {url}.*make serve"),
    ):
        service_url()


def test_a_run_works_in_the_checkout_wherever_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert enter_checkout() == {"directory": str(ROOT)}
    assert Path.cwd() == ROOT
    assert (Path.cwd() / "deployments/prefect.yaml").is_file()


def test_a_form_in_a_checkout_is_the_file_with_its_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.align import align

    monkeypatch.chdir(ROOT)
    given = {"based_on": "experiments/demo.yaml", "beta": 0.7, "overrides": ["name=other"]}
    found = align.validate_parameters({"experiment": given})["experiment"]
    assert found == load_experiment("experiments/demo.yaml", ["objective.beta=0.7", "name=other"])
    assert align.validate_parameters({"experiment": found})["experiment"] == found
