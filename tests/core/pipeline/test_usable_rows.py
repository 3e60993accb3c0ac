"""What cannot be used is told at once, before anything is computed, or left out and counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError, DataError, MissingError
from qrpo_core.data.unusable import UnusableError
from qrpo_core.inspection.explain import explain
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.plan_text import plan_lines
from qrpo_core.maintenance.in_use import known_steps
from qrpo_core.pipeline import policies, preflight, prompts, reward_trust, usable_rows
from qrpo_core.pipeline.experiment_steps import stored_reference, stored_steps
from qrpo_core.pipeline.run_headlines import untrusted_scorers
from qrpo_core.pipeline.run_report import unusable_rows
from qrpo_core.pipeline.workspace import Workspace
from tests.conftest import TEMPLATE
from tests.core import small_experiment

#: Refuses what asks for it, and nothing else.
PICKY = (
    "{% for m in messages %}{% if 'REFUSE' in m['content'] %}{{ raise_exception('not this one') }}{% endif %}"
    "{% endfor %}" + TEMPLATE
)


@pytest.fixture
def picky(make_tiny_model: Any, tmp_path: Path) -> Path:
    """The two-layer model of 512 tokens, with a template that refuses some conversations."""
    found: Path = make_tiny_model(tmp_path / "picky", template=PICKY)
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def store_of(settings: dict[str, Any]) -> Path:
    return Path(settings["store"]["path"])


def build(workspace: Workspace) -> None:
    """The stages before the first sample, without Prefect."""
    asked = prompts.recipe(workspace)
    manifest = prompts.build(workspace, asked)
    usable_rows.build(workspace, asked, prompts.stored(workspace, manifest), stored_reference(workspace))


@pytest.fixture
def many(
    settings: dict[str, Any], picky: Path, tmp_path: Path
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """2,000 prompts: 7 do not fit, 5 ground truths are no numbers, 3 are refused by the template."""
    lines = {
        "long": [3, 250, 611, 900, 1204, 1500, 1999],
        "bad": [10, 251, 252, 1000, 1800],
        "no": [5, 77, 1234],
    }
    rows = []
    for line in range(1, 2001):
        text, answer = f"Say {line}", line
        if line in lines["long"]:
            text += " x" * 300
        if line in lines["no"]:
            text += " REFUSE"
        rows.append({"prompt": text, "answer": "twelve" if line in lines["bad"] else answer})
    write(tmp_path / "questions.jsonl", rows)
    return {
        **settings,
        "model": {"path": str(picky), "dtype": "float32"},
        "reward": {"kind": "number"},
    }, lines


def test_all_of_2000_rows_are_told_in_one_message_and_nothing_is_written(
    many: tuple[dict[str, Any], dict[str, list[int]]],
) -> None:
    settings, lines = many
    for call in (preflight.check, lambda workspace: build(workspace)):
        with pytest.raises(UnusableError) as caught:
            call(Workspace(small_experiment.changed(settings)))
    head, *told = str(caught.value).splitlines()
    assert head.startswith("15 rows cannot be used (7 too long for the model, 5 with a ground truth ")
    assert "3 that the chat template refuses" in head
    places = [line.split(": ")[0].rpartition(":")[2] for line in told]
    assert sorted(map(int, places)) == sorted(n for each in lines.values() for n in each)
    by_place = dict(zip(map(int, places), told, strict=True))
    assert all("exceed 512" in by_place[line] for line in lines["long"])
    assert all("not this one" in by_place[line] for line in lines["no"])
    assert all("twelve" in by_place[line] for line in lines["bad"])
    assert not (store_of(settings) / "artifacts" / "usable").exists()
    assert not (store_of(settings) / "blocks").exists()


def test_skip_leaves_the_15_out_of_every_step_and_counts_them(
    many: tuple[dict[str, Any], dict[str, list[int]]],
) -> None:
    settings, lines = many
    settings["prompts"] |= {"on_unusable": "skip"}
    workspace = Workspace(small_experiment.changed(settings))
    preflight.check(workspace)
    first = "\n".join(plan_lines(plan(workspace), ""))
    assert "left out, prompts.on_unusable: 7 too long for the model, 5 with a ground truth" in first
    build(workspace)
    assert "left out, prompts.on_unusable: 7 too long" in "\n".join(plan_lines(plan(workspace), ""))
    steps = stored_steps(workspace)
    assert len(steps.prompts) == 1985
    left = {int(source.rpartition(":")[2]) for source in steps.prompts["source"].to_pylist()}
    assert left.isdisjoint({n for each in lines.values() for n in each})
    (row,) = unusable_rows(steps.tables.left_out)
    assert row["count"] == 15
    assert known_steps(workspace).usable_recipe == steps.usable_recipe
    gone = steps.tables.left_out.problems[0]
    with pytest.raises(MissingError, match=r"is left out \(.*exceed 512"):
        explain(workspace, gone.prompt_id or "")


def test_names_change_with_what_is_left_out_and_with_nothing_else(settings: dict[str, Any]) -> None:
    place = Path(settings["prompts"]["path"])
    rows = [{"prompt": f"Say {n}", "answer": n} for n in range(12)]
    settings = {**settings, "reward": {"kind": "number"}}
    settings["prompts"] |= {"on_unusable": "skip"}

    def names() -> tuple[str, str]:
        workspace = Workspace(small_experiment.changed(settings))
        build(workspace)
        first = stored_steps(workspace).first
        return first.left_out, first.quantiles_recipe.config.get("left_out", "")

    write(place, rows)
    assert names() == ("", "")
    write(
        place,
        [*rows, {"prompt": "Say more" + " x" * 300, "answer": 1}, {"prompt": "Say y" * 200, "answer": 1}],
    )
    left = names()
    assert left[0] == left[1] != ""
    # A judge of the evaluation alone looks at held-out prompts: training keeps its name.
    settings["evaluation"] = {"judges": {"exact": {"kind": "exact"}}}
    assert names() == left


def test_held_out_prompts_and_their_judges_are_looked_at(settings: dict[str, Any]) -> None:
    rows = [{"prompt": f"Say {n}", "answer": "twelve"} for n in range(12)]
    write(Path(settings["prompts"]["path"]), rows)
    settings["evaluation"] = {"judges": {"sums": {"kind": "number"}}}
    workspace = Workspace(small_experiment.changed(settings))
    held_out = prompts.of_split(prompts.read(workspace).prompts, "held_out")["source"].to_pylist()
    numbers = sorted(int(source.rpartition(":")[2]) for source in held_out)
    with pytest.raises(
        UnusableError
    ) as caught:  # exact asks for strings, and only held-out rows matter to it
        preflight.check(workspace)
    told = str(caught.value).splitlines()[1:]
    assert [int(line.split(": ")[0].rpartition(":")[2]) for line in told] == numbers
    assert all("evaluation.judges.sums" in line for line in told)


@pytest.mark.parametrize("unread", [(4,), (2, 4)])
def test_rows_that_cannot_be_read_are_told_with_all_others(
    settings: dict[str, Any], picky: Path, unread: tuple[int, ...]
) -> None:
    rows = [{"prompt": f"Say {n}", "answer": n} for n in range(12)]
    rows[6]["answer"] = "twelve"
    rows[7]["prompt"] = "REFUSE this"
    rows[8]["prompt"] = "x " * 600
    for n in unread:
        del rows[n]["prompt"]
    write(Path(settings["prompts"]["path"]), rows)
    asked = {**settings, "model": {"path": str(picky), "dtype": "float32"}, "reward": {"kind": "number"}}
    with pytest.raises(UnusableError) as caught:
        preflight.check(Workspace(small_experiment.changed(asked)))
    head, *told = str(caught.value).splitlines()
    assert head.startswith(f"{len(unread) + 3} rows cannot be used")
    places = [int(line.split(": ")[0].rpartition(":")[2]) for line in told]
    assert places == [n + 1 for n in (*unread, 6, 7, 8)]
    assert not store_of(settings).exists() or not list(store_of(settings).rglob("*.parquet"))


def test_null_ground_truths_are_told_by_their_field(settings: dict[str, Any]) -> None:
    write(
        Path(settings["prompts"]["path"]),
        [{"prompt": f"Say {n}", "answer": None if n in (4, 7) else n} for n in range(12)],
    )
    workspace = Workspace(small_experiment.changed({**settings, "reward": {"kind": "number"}}))
    with pytest.raises(UnusableError) as caught:
        preflight.check(workspace)
    head, *told = str(caught.value).splitlines()
    assert head.startswith("2 rows cannot be used (2 without a ground truth)")
    assert [line.split("questions.jsonl:")[1] for line in told] == [
        "5: 'answer' is null; fill it in or remove the row",
        "8: 'answer' is null; fill it in or remove the row",
    ]


def test_no_ground_truth_in_any_row_is_a_setting_that_is_missing(settings: dict[str, Any]) -> None:
    changed = small_experiment.changed(
        {**settings, "reward": {"kind": "number"}}, prompts={"ground_truth_field": None}
    )
    with pytest.raises(DataError, match=r"no ground truth.*prompts\.ground_truth_field") as caught:
        preflight.check(Workspace(changed))
    assert not isinstance(caught.value, UnusableError)


def offline(settings: dict[str, Any], rows: list[dict[str, Any]], **data: Any) -> dict[str, Any]:
    write(Path(settings["prompts"]["path"]), rows)
    section = {
        "kind": "file",
        "path": settings["prompts"]["path"],
        "chosen_field": "chosen",
        "rejected_field": "rejected",
        "held_out": 0.3,
    }
    return {**settings, "prompts": section, "training_data": {"mode": "offline", **data}}


def test_offline_completions_that_do_not_fit_are_told_by_line_and_side(
    settings: dict[str, Any], picky: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(12)]
    settings["model"]["path"] = str(picky)
    train = prompts.of_split(
        prompts.read(Workspace(small_experiment.changed(offline(settings, rows)))).prompts, "train"
    )
    one, two, *_ = (int(source.rpartition(":")[2]) for source in train["source"].to_pylist())
    rows[one - 1]["chosen"] = "x " * 300
    rows[two - 1]["rejected"] = "REFUSE"
    changed = offline(settings, rows)
    with pytest.raises(UnusableError) as caught:
        preflight.check(Workspace(small_experiment.changed(changed)))
    head, *told = str(caught.value).splitlines()
    assert head.startswith("2 rows cannot be used (")
    found = {line.split("questions.jsonl:")[1].split(":")[0]: line for line in told}
    assert found.keys() == {f"{one}, chosen", f"{two}, rejected"}
    assert "exceed 512" in found[f"{one}, chosen"]

    changed["prompts"]["on_unusable"] = "skip"
    workspace = Workspace(small_experiment.changed(changed))
    build(workspace)
    kept = stored_steps(workspace).first.rewards.completions.rows  # type: ignore[attr-defined]
    assert len(kept) == 2 * (len(train) - 2)  # a pair goes whole, and its prompt stays
    assert stored_steps(workspace).first.rewards.completions.prompts.num_rows == len(train)
    assert {row["count"] for row in unusable_rows(stored_steps(workspace).tables.left_out)} == {2}


def test_skipping_everything_is_refused(settings: dict[str, Any]) -> None:
    write(
        Path(settings["prompts"]["path"]),
        [{"prompt": f"Say {n}" + " x" * 300, "answer": n} for n in range(12)],
    )
    changed = small_experiment.changed(settings, prompts={"on_unusable": "skip"})
    with pytest.raises(UnusableError, match=r"^no train prompt can be used: 12 rows"):
        preflight.check(Workspace(changed))


def test_a_model_that_is_not_converted_yet_tells_what_the_rewards_know(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"Say {n}" + " x" * 300 * (n == 3), "answer": None if n == 4 else n} for n in range(12)
    ]
    write(Path(settings["prompts"]["path"]), rows)
    workspace = Workspace(small_experiment.changed({**settings, "reward": {"kind": "number"}}))
    monkeypatch.setattr(policies, "reference", lambda *_: None)
    with pytest.raises(UnusableError, match=r"^1 row cannot be used \(1 without a ground truth"):
        preflight.check(workspace)
    monkeypatch.undo()
    with pytest.raises(UnusableError, match=r"^2 rows cannot be used"):
        build(workspace)


def test_what_was_looked_at_once_is_not_looked_at_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small_experiment.changed(settings)
    build(Workspace(experiment))
    monkeypatch.setattr(usable_rows, "_FOUND", {})
    monkeypatch.setattr(Workspace, "chat", lambda *_: pytest.fail("the tokenizer was loaded"))
    preflight.check(Workspace(experiment))
    longer = small_experiment.changed(settings, sampling={"max_new_tokens": 510})
    monkeypatch.undo()
    with pytest.raises(UnusableError, match=r"sampling.max_new_tokens 510 exceed 512"):
        preflight.check(Workspace(longer))


def test_a_reward_that_pays_for_a_constant_is_refused_before_anything_is_sampled(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    lines = [json.dumps({"prompt": f"Is {n} odd?", "answer": "yes"}) + "\n" for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    exact = {**settings, "reward": {"kind": "exact"}}
    with pytest.raises(ConfigError, match=r"exact \[reward\].*constant answer 'yes' on 12 of 12"):
        preflight.check(Workspace(small_experiment.changed(exact)))
    assert not list(Workspace(small_experiment.changed(exact)).artifacts.manifests())


def test_what_is_to_be_said_against_a_reward_is_found_once_and_a_headline(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"prompt": f"Is {n} odd?", "answer": "yes"}) + "\n" for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    warned = small_experiment.changed({**settings, "reward": {"kind": "exact", "trust": "warn"}})
    with pytest.warns(UserWarning, match="constant answer 'yes'"):
        preflight.check(Workspace(warned))
    with monkeypatch.context() as patch:
        patch.setattr(reward_trust, "reward_doubts", lambda *_: pytest.fail("tried again in one process"))
        with pytest.warns(UserWarning, match="constant answer 'yes'"):
            build(Workspace(warned))
    monkeypatch.setattr(reward_trust, "_FOUND", {})
    monkeypatch.setattr(reward_trust, "reward_doubts", lambda *_: pytest.fail("tried again at a start"))
    with pytest.warns(UserWarning, match="constant answer 'yes'"):
        preflight.check(Workspace(warned))
    with pytest.raises(ConfigError, match=r"exact \[reward\].*constant answer 'yes' on 12 of 12"):
        preflight.check(Workspace(small_experiment.changed({**settings, "reward": {"kind": "exact"}})))
    found = stored_steps(Workspace(warned)).reward_problems
    finished = SimpleNamespace(reward_problems=found)
    (line,) = untrusted_scorers(finished)  # type: ignore[arg-type]
    assert str(line).startswith(
        "Warning: exact [reward]: it pays the full score for the constant answer 'yes'"
    )


def test_doubts_about_a_judge_name_it(settings: dict[str, Any], tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Is {n} odd?", "answer": "yes"}) + "\n" for n in range(12)]
    (tmp_path / "questions.jsonl").write_text("".join(lines))
    judged = {**settings, "reward": {"kind": "length", "max_words": 3}}
    judged["evaluation"] = {"judges": {"strict": {"kind": "exact"}}}
    judged["prompts"] = {**settings["prompts"], "held_out": 0.5}
    with pytest.raises(ConfigError, match=r"exact \[evaluation.judges.strict\].*constant answer 'yes'"):
        preflight.check(Workspace(small_experiment.changed(judged)))
