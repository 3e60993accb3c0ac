"""Lines of `qrpo plan` beside the table of stages."""

from __future__ import annotations

from typing import Any

import pytest

from qrpo_core.config.reading import parse_experiment
from qrpo_core.inspection.plan_text import references_line

SMALL: dict[str, Any] = {
    "name": "plan-line",
    "model": {"path": "somewhere"},
    "prompts": {"kind": "file", "path": "some.jsonl", "chosen_field": "a", "rejected_field": "b"},
    "sampling": {"engine": "fake", "references_per_prompt": 8},
    "reward": {"kind": "length", "max_words": 1},
}


@pytest.mark.parametrize(
    ("sections", "found"),
    [
        ({}, "quantile 0.885): 18; there are 7."),
        ({"training_data": {"mode": "best_worst", "pool": 4}}, "18; there are 4."),
        ({"training_data": {"mode": "offline"}}, "18; there are 8."),
        ({"training_data": {"mode": "offline", "references": "offline"}}, "quantile 0.885): 18."),
        ({"objective": {"beta": 0.01}}, "109; there are 7."),
        ({"objective": {"transform": "normal", "beta": 0.001}}, "inf; there are 7."),
        ({"objective": {"kind": "dpo"}, "training_data": {"mode": "pairs"}}, None),
    ],
)
def test_the_references_that_a_sign_needs_beside_those_that_there_are(
    sections: dict[str, Any], found: str | None
) -> None:
    lines = references_line(parse_experiment(SMALL | sections))
    assert (lines == []) if found is None else lines[0].endswith(found)
