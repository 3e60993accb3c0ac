"""Numbers that YAML 1.1 reads as others are refused, in files and options; all else is as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qrpo_core.common.errors import ConfigError
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import apply_override, load_experiment
from qrpo_core.pipeline.variants import expand
from tests.core.small_experiment import changed, settings

__all__ = ["settings"]

GOOD = "model: {path: m}\nprompts: {kind: file, path: p.jsonl}\n"
REWARD = "reward: {kind: length, max_words: 5}\n"
#: As written, what YAML 1.1 reads, and what is meant.
TRAPS = [
    ("010", "8", "10"),
    ("-017", "-15", "-17"),
    ("0_12", "10", "12"),
    ("1:30", "90", "90"),
    ("12:30:45", "45045", "45045"),
    ("1:30.5", "90.5", "90.5"),
]


@pytest.mark.parametrize(("written", "read", "meant"), TRAPS)
def test_a_number_that_is_read_as_another_is_refused(
    tmp_path: Path, written: str, read: str, meant: str
) -> None:
    assert str(yaml.safe_load(written)) == read
    file = tmp_path / "e.yaml"
    remedy = rf": write {meant} for the number, or '{written}' in quotes for the text"
    for place in (f"training: {{seed: {written}}}\n", f"training:\n  lora_targets: [a, {written}]\n"):
        file.write_text(GOOD + REWARD + place)
        with pytest.raises(ConfigError, match=rf"^YAML reads {written} as {read} \[.*e\.yaml:[45]\]{remedy}"):
            load_experiment(file)
    file.write_text(GOOD + REWARD)
    with pytest.raises(ConfigError, match=rf"^YAML reads {written} as {read} \[--set training.*{remedy}"):
        load_experiment(file, [f"training.seed={written}"])


def test_a_key_too(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(f"{GOOD}{REWARD}evaluation: {{judges: {{010: {{kind: length, max_words: 3}}}}}}\n")
    with pytest.raises(ConfigError, match="YAML reads 010 as 8"):
        load_experiment(file)


def test_a_variant_too(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"batch_size 010: YAML reads 010 as 8 \(write 10"):
        expand(changed(settings), ComparisonConfig(vary=("training.batch_size=4,010",)))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("0", 0), ("00", 0), ("07", 7), ("0.5", 0.5), ("01.5", 1.5), ("0x10", 16), ("0b11", 3)),
        *(("1_000", 1000), ("'010'", "010"), ('"1:30"', "1:30"), ("a:30", "a:30"), ("!!str 010", "010")),
    ],
)
def test_what_is_read_as_written_stays(written: str, value: object) -> None:
    data: dict[str, Any] = {}
    apply_override(data, f"key={written}")
    assert data == {"key": value}


def test_what_is_printed_can_be_read(tmp_path: Path) -> None:
    """`qrpo config` quotes the texts that would be refused."""
    file = tmp_path / "e.yaml"
    file.write_text(f"{GOOD}{REWARD}name: '010'\nsampling: {{seed: 10}}\n")
    experiment = load_experiment(file)
    file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    assert load_experiment(file) == experiment
