"""What chat templates are given beside the messages: in the recipes of what it decides, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ModelError
from qrpo_core.config.reading import parse_experiment
from qrpo_core.models import template_clock
from qrpo_core.models.loading import load_tokenizer
from qrpo_core.pipeline import policies, prompts
from qrpo_core.pipeline.experiment_steps import ExperimentSteps, budget_recipes, stored_steps
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.row_recipes import sample_recipe
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store import artifacts
from tests.core import small_experiment
from tests.core.small_experiment import precompute

DATED = (
    "{{ bos_token + '<|system|>' + strftime_now('%d %b %Y') + '<|end|>' }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPOKEN = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' + (tone | default('')) }}{% endif %}"
)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set the clock (UTC) of templates and of the store."""

    def set_clock(moment: str) -> None:
        now = datetime.fromisoformat(moment).replace(tzinfo=UTC)

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return now

        monkeypatch.setattr(template_clock, "datetime", Clock)
        monkeypatch.setattr(artifacts, "datetime", Clock)

    return set_clock


@pytest.fixture
def dated(settings: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """The experiment with a model whose template writes the day."""
    folder = make_tiny_model(tmp_path / "dated", template=DATED)
    return settings | {"model": settings["model"] | {"path": str(folder)}}


def rendered(steps: ExperimentSteps) -> set[str]:
    """The different days in the prompts of the training set."""
    training = steps.workspace.artifacts.get(steps.first.training_set_recipe)
    from qrpo_core.common.schemas import TRAINING_SET

    rows = steps.workspace.load(training, "training_set.parquet", TRAINING_SET)[
        "prompt_token_ids"
    ].to_pylist()
    chat = steps.workspace.chat(steps.reference.directory)
    return {chat.decode(row)[:11] for row in rows}


def test_a_run_over_midnight_has_one_day(dated: dict[str, Any], on: Callable[[str], None]) -> None:
    """More references the next day are drawn from the same prompts, and nothing is computed twice."""
    on("2024-07-05T23:59:59")
    steps, computed = precompute(small_experiment.changed(dated))
    drawn = computed["sample references"]
    assert rendered(steps) == {"05 Jul 2024"}
    on("2024-07-06T00:00:01")
    again, computed = precompute(small_experiment.changed(dated))
    assert set(computed.values()) == {0}
    more, computed = precompute(small_experiment.changed(dated, sampling={"references_per_prompt": 4}))
    assert computed["sample references"] == drawn // 3
    assert rendered(more) == rendered(again) == {"05 Jul 2024"}
    assert more.first.row_steps[0].recipe.key == steps.first.row_steps[0].recipe.key
    assert (
        budget_recipes(Workspace(small_experiment.changed(dated)))[0].key
        == steps.first.row_steps[0].recipe.key
    )


def test_the_day_of_the_experiment_goes_before_that_of_the_artifact(
    dated: dict[str, Any], on: Callable[[str], None]
) -> None:
    on("2024-07-05T12:00:00")
    steps, _ = precompute(small_experiment.changed(dated))
    named, computed = precompute(small_experiment.changed(dated, prompts={"date": "2020-02-29"}))
    assert rendered(named) == {"29 Feb 2020"}
    assert computed["sample references"] > 0
    assert named.prompts_recipe.key == steps.prompts_recipe.key
    same, computed = precompute(small_experiment.changed(dated, prompts={"date": "2024-07-05"}))
    assert set(computed.values()) == {0}
    assert same.first.train_recipe.key == steps.first.train_recipe.key


def test_a_template_without_clock_has_the_recipes_that_it_had(
    settings: dict[str, Any], on: Callable[[str], None]
) -> None:
    on("2024-07-05T12:00:00")
    steps, _ = precompute(small_experiment.changed(settings))
    named, computed = precompute(small_experiment.changed(settings, prompts={"date": "2020-02-29"}))
    assert set(computed.values()) == {0}
    config = named.first.row_steps[0].recipe.config
    assert not config.keys() & {"date", "chat_template_kwargs"}
    assert named.first.train_recipe.key == steps.first.train_recipe.key
    assert named.usable_recipe.key == steps.usable_recipe.key


def test_a_template_that_is_of_no_use_is_refused_once(
    settings: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Before anything is stored, and not once a row."""
    folder = make_tiny_model(tmp_path / "m", template=DATED.partition("{% if add_generation")[0])
    workspace = Workspace(parse_experiment(settings | {"model": {"path": str(folder)}}))
    with pytest.raises(ModelError, match="has no generation prompt"):
        check(workspace)
    assert not list(workspace.artifacts.manifests())


def test_variables_of_the_template_are_part_of_what_they_decide(
    settings: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "spoken", template=SPOKEN)
    settings = settings | {"model": settings["model"] | {"path": str(folder)}}
    plain, _ = precompute(small_experiment.changed(settings))
    kind, computed = precompute(
        small_experiment.changed(settings, model={"chat_template_kwargs": {"tone": "Dear"}})
    )
    assert computed["sample references"] > 0
    assert kind.prompts_recipe.key == plain.prompts_recipe.key
    assert kind.usable_recipe.key != plain.usable_recipe.key
    assert kind.first.row_steps[0].recipe.config["chat_template_kwargs"] == {"tone": "Dear"}
    chat = kind.workspace.chat(kind.reference.directory)
    assert chat.decode(chat.prompt_token_ids([{"role": "user", "content": "Hi"}])) == "HiDear"


def test_marks_of_thinking_that_are_special_tokens_are_named_by_the_samples(
    settings: dict[str, Any], make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Their texts hold the marks; where no mark is a special token, the recipe is as it was."""

    def config_of(reward: dict[str, Any]) -> dict[str, Any]:
        workspace = Workspace(parse_experiment(changed | {"reward": reward}))
        reference = policies.reference(workspace, policies.source_of(workspace))
        assert reference is not None
        return sample_recipe(workspace, reference).config

    changed = settings
    length = {"kind": "length", "max_words": 5}
    assert "shown" not in config_of(length)
    folder = make_tiny_model(tmp_path / "thinking")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<|so|>"]})
    tokenizer.save_pretrained(folder)
    changed = settings | {"model": {"path": str(folder)}}
    assert config_of(length)["shown"] == ["[/THINK]", "[THINK]"]
    own = {"open": "<|because|>", "close": "<|so|>"}
    assert config_of(length | {"thinking": own})["shown"] == ["<|so|>", "[/THINK]", "[THINK]"]


def test_two_time_zones_make_one_set_of_rows(dated: dict[str, Any], tmp_path: Path) -> None:
    """Half of the rows on a clock where it is always another day than on the clock of the other half."""
    code = (
        "import json, sys, datetime\n"
        "from qrpo_core.config.reading import parse_experiment\n"
        "from qrpo_core.pipeline import prompts\n"
        "from qrpo_core.pipeline.experiment_steps import stored_steps\n"
        "from qrpo_core.pipeline.workspace import Workspace\n"
        "workspace = Workspace(parse_experiment(json.loads(sys.argv[1])))\n"
        "prompts.build(workspace, prompts.recipe(workspace))\n"
        "step = stored_steps(workspace).first.row_steps[0]\n"
        "plan = workspace.blocks.plan(step.recipe, step.wanted, 4)[0]\n"
        "table, facts = step.compute(plan, lambda n: None)\n"
        "workspace.blocks.commit(plan, table, step.schema, 1.0, **facts)\n"
        "print(datetime.date.today(), step.recipe.key)"
    )
    experiment = small_experiment.changed(dated, store={"rows_per_block": 4})
    said = [
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(experiment.model_dump(mode="json"))],
            env=os.environ | {"TZ": zone},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago")
    ]
    (day, key), (other_day, other_key) = said
    assert day != other_day
    assert key == other_key
    workspace = Workspace(experiment)
    step = stored_steps(workspace).first.row_steps[0]
    assert step.recipe.key == key
    assert sum(block.rows for block in workspace.blocks.committed(step.recipe)) == 8


def test_the_plan_before_anything_is_stored_takes_today(
    dated: dict[str, Any], on: Callable[[str], None]
) -> None:
    on("2024-07-05T12:00:00")
    workspace = Workspace(small_experiment.changed(dated))
    on("2024-07-06T12:00:00")
    prompts.find(workspace, prompts.recipe(workspace))
    assert workspace.day == "2024-07-06"
