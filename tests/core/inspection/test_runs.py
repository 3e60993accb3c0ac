"""The ledger of runs: every run is found from the store alone, by its number or a digest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.run_diff import ahead, diff_lines
from qrpo_core.inspection.runs import also, differing, run_lines, short_text, show_lines
from qrpo_core.maintenance.gc import delete, garbage, garbage_lines
from qrpo_core.pipeline import evaluation
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.input_files import carry
from qrpo_core.pipeline.run_ledger import RunLedger, StoredRun, names_a_run
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.backends.opening import open_objects
from tests.core.small_experiment import changed
from tests.core.stores import NOW, files, sweep
from tests.flows.small import call

Stages = Callable[[Experiment], Iterator[str]]


def finish(experiment: Experiment, stages: Stages) -> None:
    """A run of the experiment to its end, with a report of one line."""
    list(stages(experiment))
    workspace = Workspace(experiment)
    steps = stored_steps(workspace)
    end = steps.after(steps.last())
    evaluation.build(workspace, end)
    facts = {"headlines": ["Warning: of a test."]} | workspace.settings_facts
    workspace.artifacts.commit(end.report, {"report.html": b"<p>a report</p>"}, facts, 0.0)


@pytest.fixture
def pair(settings: dict[str, Any], stages: Stages) -> tuple[Experiment, Experiment]:
    """Two finished runs of one experiment, with another beta."""
    found = tuple(changed(settings | {"name": "small"}, objective={"beta": beta}) for beta in (0.1, 0.3))
    for each in found:
        finish(each, stages)
    return found[0], found[1]


def test_every_run_is_listed_with_what_differs_and_where_its_files_are(
    pair: tuple[Experiment, Experiment],
) -> None:
    ledger = RunLedger(pair[0].store)
    assert [run.number for run in ledger.runs] == [1, 2]
    assert sorted(differing(ledger.runs).values()) == ["beta 0.1", "beta 0.3"]
    text = run_lines(ledger)
    assert text[2].split("  ")[0] == "no."
    assert text[-1].endswith(f"qrpo diff RUN RUN, each with --store {ledger.objects.url}.")
    assert also(RunLedger(StoreConfig())) == ""
    for run in ledger.runs:
        row = text[3 + run.number]
        assert all(part in row for part in (run.digest[:8], "small", "qrpo", " → "))
        assert run.report is not None
        assert Path(ledger.place(run.report, "report.html")).is_file()
        assert Path(ledger.place(run.train, "policy")).is_dir()
        assert parse_experiment(dict(run.experiment or {})) in pair
        said = "\n".join(show_lines(ledger, run))
        assert "Mean reward" in said
        assert said.endswith(f"Settings: qrpo config {run.digest[:8]} --store {ledger.objects.url}")
        assert "Warning: of a test." in said


def test_a_file_in_the_store_is_shown_by_its_name() -> None:
    assert short_text(f"store:inputs/{'0123456789abcdef' * 2}/my.jsonl") == "my.jsonl (01234567)"
    assert short_text("x" * 40) == "x" * 29 + "…"
    assert short_text(None) == "none"


def test_a_run_is_found_by_its_number_and_by_any_digest_of_it(pair: tuple[Experiment, Experiment]) -> None:
    ledger = RunLedger(pair[0].store)
    for run in ledger.runs:
        assert ledger.find(f"{run.number}") is run
        assert run.policy is not None
        for digest in (run.digest, run.policy, *(each.key for each in run.artifacts)):
            assert ledger.find(digest) is run
            assert ledger.find(digest[:12]) is run
    for name in ("0", "3", "ffffffffffff", "99999"):
        with pytest.raises(ConfigError, match="it has runs 1 to 2"):
            ledger.find(name)


def test_what_can_only_be_a_run_is_one_and_a_file_never_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(names_a_run(text) for text in ("1", "99999", "0123456", "abcdef", "0" * 32))
    assert not any(
        names_a_run(text) for text in ("", "abc", "x.yaml", "experiments/a", "ABCDEF", "0" * 33, "1 ")
    )
    (tmp_path / "12").write_text("")
    assert not names_a_run("12")


def test_evaluations_of_one_policy_are_runs_that_share_it(
    pair: tuple[Experiment, Experiment], settings: dict[str, Any], stages: Stages
) -> None:
    again = changed(settings | {"name": "small"}, objective={"beta": 0.1}, evaluation={"seed": 5})
    workspace = Workspace(again)
    steps = stored_steps(workspace)
    evaluation.build(workspace, steps.after(steps.last()))
    ledger = RunLedger(again.store)
    assert len(ledger.runs) == 3
    (policy,) = {run.train.key for run in ledger.runs if "seed" in differing(ledger.runs)[run.digest]} - {
        run.train.key for run in ledger.runs if run.settings["objective.beta"] == 0.3
    }
    shared = [run for run in ledger.runs if run.train.key == policy]
    assert sorted(run.settings["evaluation.seed"] for run in shared) == [0, 5]
    with pytest.raises(ConfigError, match="2 runs answer to"):
        ledger.find(policy)
    (bare,) = (run for run in shared if not run.reports)
    with pytest.raises(MissingError, match=f"run {bare.number} has no report"):
        ledger.report_path(bare)


def test_runs_of_older_versions_are_listed_with_the_settings_of_their_training(
    pair: tuple[Experiment, Experiment],
) -> None:
    """Manifests without the facts that later versions keep: the policy by its log-probs, no experiment."""
    for path in Path(pair[0].store.path).glob("artifacts/*/*/manifest.json"):
        raw = json.loads(path.read_text())
        for name in ("experiment", "policy", "headlines"):
            raw["facts"].pop(name, None)
        path.chmod(0o644)
        path.write_text(json.dumps(raw))
    ledger = RunLedger(pair[0].store)
    assert [run.name for run in ledger.runs] == ["small", "small"]  # the report's recipe says so
    assert sorted(differing(ledger.runs).values()) == ["beta 0.1", "beta 0.3"]
    assert len(run_lines(ledger)) > 6
    with pytest.raises(ConfigError, match="kept no settings with it"):
        ledger.experiment_of("1")


def test_a_damaged_manifest_hides_its_run_alone(pair: tuple[Experiment, Experiment]) -> None:
    first, second = RunLedger(pair[0].store).runs
    (Path(pair[0].store.path) / first.train.manifest_key).chmod(0o644)
    (Path(pair[0].store.path) / first.train.manifest_key).write_text("{")
    lines = run_lines(ledger := RunLedger(pair[0].store))
    assert [run.digest for run in ledger.runs] == [second.digest]
    assert any(
        line.startswith(f"Damaged, so its run is not shown: {first.train.manifest_key}") for line in lines
    )


def test_two_runs_are_compared_prompt_by_prompt_where_one_judge_saw_both(
    pair: tuple[Experiment, Experiment], settings: dict[str, Any], stages: Stages
) -> None:
    ledger = RunLedger(pair[0].store)
    first, second = ledger.runs
    text = "\n".join(diff_lines(ledger, first, second))
    assert "objective.beta  0." in text
    assert "on the same" in ahead(ledger, first, second)
    # The fake engine draws the same tokens from every policy.
    assert ": 0.000 [0.000, 0.000]." in ahead(ledger, first, second)
    finish(changed(settings, reward={"kind": "length", "max_words": 3}), stages)
    ledger = RunLedger(pair[0].store)
    assert "the reward, the held-out prompts or the sampling differ" in ahead(ledger, *ledger.runs[1:])


def test_a_run_stands_for_its_experiment(
    pair: tuple[Experiment, Experiment], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = pair[0].store.path
    run = next(run for run in RunLedger(pair[0].store).runs if run.settings["objective.beta"] == 0.3)
    assert call("config", run.digest[:8], "--store", store, "--set", "objective.beta=0.5") == 0
    printed = parse_experiment(yaml.safe_load(capsys.readouterr().out))
    assert printed.objective.beta == 0.5
    assert printed.model_copy(update={"objective": pair[1].objective}).store.path == store
    assert call("report", f"{run.number}", "--store", store, "--out", str(tmp_path / "r.html")) == 0
    assert (tmp_path / "r.html").read_bytes() == b"<p>a report</p>"
    for verb in (("show",), ("diff", f"{run.number}")):
        assert call(*verb, f"{run.number}", "--store", store) == 0
    assert call("runs", "--store", store) == 0
    assert call("plan", f"{run.number}", "--store", store) == 0
    capsys.readouterr()
    before = files(pair[0])
    cases = [
        (["show", "77", "--store", store], "no run '77': it has runs 1 to 2"),
        (["report", "abcdef0", "--store", store], "no run 'abcdef0'"),
        (["diff", "1", "x.yaml", "--store", store], "no run 'x.yaml'"),
        (["show", "1", "--store", str(tmp_path / "none")], "it has no run"),
        (["show", "1", "--store", "gs://bucket"], "unknown scheme 'gs'"),
        (["config", "1", "--store", store, "--set", "objective.gamma=1"], "unknown key"),
    ]
    for arguments, says in cases:
        assert call(*arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert files(pair[0]) == before
    assert not (tmp_path / "none").exists()


def test_files_are_compared_by_their_content_wherever_a_run_was_started(
    settings: dict[str, Any], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run here, one that was submitted from elsewhere, and one here after the reward was edited."""
    # Names of no other test: a process imports a module once.
    score = "import letters\n\n\ndef score(batch):\n    return [letters.most(r.completion) for r in batch]\n"
    for name, most in (("here", "4"), ("user", "4"), ("edited", "5")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "counted.py").write_text(score)
        (folder / "letters.py").write_text(f"def most(text):\n    return min(len(text), {most})\n")
        shutil.copyfile(settings["prompts"]["path"], folder / "rows.jsonl")
        shutil.copytree(settings["model"]["path"], folder / "model")
    python = {"kind": "python", "python": {"function": "counted:score"}}
    own = {**settings, "name": "own", "model": {"path": "model", "dtype": "float32"}, "reward": python}

    def experiment(beta: float, **python_settings: str) -> Experiment:
        own["reward"]["python"] |= python_settings
        return changed(own, prompts={"path": "rows.jsonl"}, objective={"beta": beta})

    monkeypatch.chdir(tmp_path / "here")
    finish(experiment(0.1), stages)
    sent = carry(experiment(0.3), open_objects(experiment(0.3).store), (tmp_path / "user",)).experiment
    assert sent.model.path == str(tmp_path / "user" / "model")
    finish(sent, stages)
    monkeypatch.chdir(tmp_path / "edited")
    finish(experiment(0.1, version="2"), stages)
    ledger = RunLedger(sent.store)
    here, submitted, edited = ledger.runs

    def differ(first: StoredRun, second: StoredRun) -> set[str]:
        said = diff_lines(ledger, first, second)
        start = said.index("Settings that differ") + 3
        return {line.split()[0] for line in said[start : said.index("", start)]}

    assert differ(here, submitted) == {"objective.beta"}
    assert differ(here, edited) == {"reward.python.file", "reward.python.version", "training"}
    assert ", file counted.py (" in differing(ledger.runs)[here.digest]
    assert here.experiment is not None
    assert here.experiment["prompts"]["path"] == "rows.jsonl"  # as it was given, to run it again


def kept_results(experiment: Experiment) -> set[str]:
    return {name for name in files(experiment) if name.split("/")[1] in ("train", "evaluate", "report")}


def test_gc_keeps_policies_and_reports_unless_each_is_named(
    pair: tuple[Experiment, Experiment], settings: dict[str, Any], stages: Stages
) -> None:
    elsewhere = changed(settings, reward={"kind": "length", "max_words": 9}, prompts={"held_out": 0.4})
    finish(elsewhere, stages)
    results = kept_results(elsewhere)
    swept = {each.what.split()[1].split("/")[0] for each in sweep(elsewhere)}
    assert {"reward", "quantiles", "training_set"} <= swept
    assert kept_results(elsewhere) == results
    ledger = RunLedger(elsewhere.store)
    assert len(ledger.runs) == 3
    assert all(show_lines(ledger, run) for run in ledger.runs)  # without the rows they were made from

    now = datetime.now(UTC) - NOW
    run = next(run for run in ledger.runs if run.settings["objective.beta"] == 0.3)
    own = next(run for run in ledger.runs if run.settings["prompts.held_out"] == 0.4)
    found = garbage([Workspace(elsewhere)], now)
    assert found.garbage == []
    assert {each.run.number for each in found.kept} == {each.number for each in ledger.runs} - {own.number}
    text = "\n".join(garbage_lines(found, "here", days=0))
    assert "2 runs with policy and reports" in text
    with pytest.raises(ConfigError, match="is a result of"):
        garbage([Workspace(elsewhere)], now, [own])
    with pytest.raises(ConfigError, match="is young"):
        garbage([Workspace(elsewhere)], datetime.now(UTC) - timedelta(days=7), [run])
    named = garbage([Workspace(elsewhere)], now, [run])
    assert delete(Workspace(elsewhere).objects, named.garbage) == []
    gone = results - kept_results(elsewhere)
    assert {name.split("/")[2] for name in gone} == {each.key for each in run.artifacts}
    assert [each.digest for each in RunLedger(elsewhere.store).runs] == [
        each.digest for each in ledger.runs if each.digest != run.digest
    ]
