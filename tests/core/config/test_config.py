from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment, cache_key_fields
from qrpo_core.config.reading import load_experiment, parse_experiment

MINIMAL = {
    "model": {"path": "somewhere"},
    "prompts": {"kind": "template", "templates": ["Hello {name}"], "words": {"name": ["you"]}, "size": 1},
    "reward": {"kind": "sentiment"},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_the_name_defaults_to_the_files(file: Path) -> None:
    assert load_experiment(file).name == "trial"


def test_overrides_are_yaml_values_at_dotted_keys(file: Path) -> None:
    overrides = [
        "sampling.references_per_prompt=16",
        "training.learning_rate=3e-5",
        "prompts.words.name=[a, b]",
    ]
    experiment = load_experiment(file, overrides)
    assert experiment.sampling.references_per_prompt == 16
    assert experiment.training.learning_rate == 3e-5
    assert experiment.prompts.words == {"name": ("a", "b")}


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("samplng", {}, "unknown key 'samplng' [trial.yaml]: did you mean 'sampling'?"),
        ("sampling", {"refrences_per_prompt": 3}, "did you mean 'references_per_prompt'?"),
        ("sampling", {"references_per_prompt": 0}, "sampling.references_per_prompt = 0 is refused"),
        ("sampling", {"temperature": 0}, "sampling.temperature = 0 is refused"),
        ("objective", {"beta": -0.1}, "objective.beta = -0.1 is refused"),
        ("objective", {"beta": float("nan")}, "objective.beta = nan is refused"),
        ("objective", {"transform": "cube"}, "'identity', 'log'"),
        ("reward", {"kind": "weighted"}, "reward.terms is missing"),
        ("reward", {"kind": "weighted", "terms": [{"weight": 1, "reward": {"kind": "lenght"}}]}, "'lenght'"),
        (
            "reward",
            {"kind": "sentiment", "tolerance": 1},
            "reward.tolerance does not belong to kind 'sentiment'",
        ),
        ("reward", {"kind": "length", "min_words": 9, "max_words": 3}, "reward.max_words 3 is below"),
        ("prompts", {"kind": "file"}, "prompts.path is missing"),
        (
            "prompts",
            {"kind": "file", "path": "x", "reference_field": "a"},
            "prompts.reference_field is now prompts.ground_truth_field [trial.yaml]",
        ),
        (
            "prompts",
            {"kind": "reasoning_gym", "task": "x", "size": 2, "path": "y"},
            "prompts.path does not belong",
        ),
        ("prompts", {"kind": "file", "path": "x", "held_out": 1.0}, "prompts.held_out = 1.0 is refused"),
        ("prompts", {"kind": "file", "path": "x", "chosen_field": "c"}, "come together"),
        ("prompts", {"kind": "file", "path": "x", "completion_fields": ["a", "a"]}, "names a column twice"),
        (
            "prompts",
            {"kind": "file", "path": "x", "completion_reward_field": "r"},
            "needs prompts.completion",
        ),
        ("training", {"lora_alpha": 8}, "training.lora_alpha has no effect without training.lora_rank"),
        ("training", {"deepspeed": "ds.json", "parallel": "fsdp"}, "exclude each other"),
        (
            "training",
            {"compile": "always", "parallel": "fsdp"},
            "training.compile always works in whole copies",
        ),
        (
            "training",
            {"lora_base": "bfloat16"},
            "training.lora_base has no effect without training.lora_rank",
        ),
        ("training", {"weights_dtype": "bfloat16", "lora_rank": 8}, "with lora_rank set lora_base"),
        ("training", {"weights_dtype": "bfloat16", "precision": "fp32"}, "needs training.precision bf16"),
        ("training", {"weights_dtype": "bfloat16", "parallel": "fsdp"}, "works in whole copies of the model"),
        ("training", {"gradient_checkpointing": True}, "is now training.activation_checkpointing"),
        (
            "objective",
            {"kind": "dpo", "tie_method": "mid"},
            "objective.tie_method does not belong to kind 'dpo'",
        ),
        ("objective", {"kind": "dpo"}, "training_data.mode 'random' makes no pairs"),
        ("objective", {"transform": "power"}, "come together"),
        ("objective", {"beta_max": 0.1}, "it needs objective.beta_scale by_length"),
        ("training_data", {"mode": "best_worst"}, "training_data.pool is missing"),
        ("training_data", {"mode": "best_worst", "pool": 8}, "leaves 0 of sampling.references_per_prompt 8"),
        ("training_data", {"mode": "offline"}, "needs prompts.chosen_field"),
        ("training_data", {"count": 2, "mode": "offline"}, "does not belong to mode 'offline'"),
        ("model", {}, "'model.path' is missing"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(section: str, values: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_experiment({**MINIMAL, section: values}, where="trial.yaml")
    assert says in str(error.value)
    assert "trial.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["nonsense"], "write it as section.field=value"),
        (["=3"], "write it as section.field=value"),
        (["model.path.x=3"], "'path' is a value, not a section"),
        (["objective.bta=3"], "did you mean 'beta'?"),
        (["objective.beta=[1"], "is not YAML"),
    ],
)
def test_bad_overrides(file: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(file, overrides)
    assert says in str(error.value)


@pytest.mark.parametrize("written", ["no", "12", "0.5", "2026-01-31"])
def test_a_text_that_yaml_reads_as_another_value_wants_quotes(file: Path, written: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.system = .* is refused .* put it in quotes"):
        load_experiment(file, [f"prompts.system={written}"])
    assert load_experiment(file, [f"prompts.system='{written}'"]).prompts.system == written


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="a mapping of sections"):
        load_experiment(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_experiment(tmp_path / "broken.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_experiment(tmp_path)


def test_an_experiment_is_frozen_and_survives_json() -> None:
    experiment = parse_experiment(MINIMAL)
    with pytest.raises(ValidationError):
        experiment.model.path = "elsewhere"  # type: ignore[misc]
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment


def test_speed_settings_stay_out_of_recipes() -> None:
    one = parse_experiment(MINIMAL)
    two = parse_experiment(
        {
            **MINIMAL,
            "sampling": {"batch_size": 3, "references_per_prompt": 99},
            "training": {"compile": "never", "micro_batch_tokens": 1, "activation_checkpointing": 0.5},
        }
    )
    assert cache_key_fields(one.sampling) == cache_key_fields(two.sampling)
    assert cache_key_fields(one.training) == cache_key_fields(two.training)
    hotter = parse_experiment({**MINIMAL, "sampling": {"temperature": 2.0}})
    assert cache_key_fields(one.sampling) != cache_key_fields(hotter.sampling)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[3].glob("experiments/*.yaml")), ids=lambda p: p.name
)
def test_the_shipped_experiments_are_valid(path: Path) -> None:
    assert load_experiment(path).name == path.stem
