"""The kin of QRPO on one stored training set: targets, diagnostics, what each setting refuses and counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.config import cache_key_fields
from qrpo_core.inspection.budget import propose
from qrpo_core.inspection.explain.explanation import explain
from qrpo_core.inspection.explain.text import explain_lines
from qrpo_core.objective_kinds import KINDS
from qrpo_core.pipeline.workspace import Workspace
from tests.core.pipeline.test_modes import data_of, paired  # noqa: F401
from tests.core.small_experiment import changed, precompute

OWN: dict[str, dict[str, Any]] = {
    "tup": {"truncation": 0.3},
    "a_star": {"value_beta": 0.2},
    "best_of_n": {"candidates": 8},
}


@pytest.mark.parametrize("kind", OWN)
def test_one_training_set_serves_the_kin_of_qrpo(settings: dict[str, Any], kind: str) -> None:
    settings = {**settings, "sampling": settings["sampling"] | {"references_per_prompt": 6}}
    steps, _ = precompute(changed(settings))
    asked = changed(settings, objective={"kind": kind, **OWN[kind]})
    _, computed = precompute(asked)
    assert set(computed.values()) == {0}
    data = data_of(steps, asked)
    assert data.targets is not None
    rewards, names = data.table["reward"].to_numpy(), data.table["prompt_id"].to_pylist()
    q = data.targets.quantile
    for row, (name, target) in enumerate(zip(names, data.targets.log_ratio.tolist(), strict=True)):
        pool = rewards[[each == name for each in names]]
        if len(set(pool)) == 1:
            assert target == 0
        elif kind == "a_star":
            value = 0.2 * math.log(np.mean(np.exp(pool / 0.2)))
            assert target * 0.1 == pytest.approx(rewards[row] - value)
        elif kind == "tup":
            assert (target == -math.inf) == (q[row] <= 0.3)
    items = data.items()
    assert [item.beta for item in items] == data.targets.beta.tolist()
    assert [item.log_partition for item in items] == data.targets.log_partition.tolist()
    facts = data.diagnostics
    assert facts["objective"] == kind
    assert facts | OWN[kind] == facts
    assert facts["beta"] == pytest.approx(1 / 7 if kind == "best_of_n" else 0.1)
    assert ("normalisation_mean" in facts) == (kind != "a_star")
    assert ("zero_targets" in facts) == (kind == "tup")
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("kind", OWN)
def test_offline_data_is_ranked_and_shown(
    paired: dict[str, Any],  # noqa: F811
    kind: str,
) -> None:
    asked = changed(paired, objective={"kind": kind})
    steps, computed = precompute(asked)
    assert computed["sample references"] > 0  # targets follow from references
    data = data_of(steps)
    assert data.targets is not None
    assert not any(data.table["in_pool"].to_pylist())
    workspace = Workspace(asked)
    prompt, index = data.table["prompt_id"][0].as_py(), data.table["sample_index"][0].as_py()
    found = explain(workspace, prompt)
    json.dumps(found, allow_nan=False)
    assert any(kind in json.dumps(section.get("objective", {})) for section in found["draws"])
    assert explain_lines(explain(workspace, f"{prompt}:{index}"))
    if kind != "a_star":  # which ranks nothing; tests/core/pipeline/test_budgets.py has its refusal
        assert propose(workspace, add=5).lines


def test_a_clip_of_targets_is_counted(settings: dict[str, Any]) -> None:
    steps, _ = precompute(changed(settings))
    plain, clipped = (
        data_of(steps, changed(settings, objective={"beta": 0.01} | more))
        for more in ({}, {"target_clip": 0.5})
    )
    assert plain.targets is not None
    assert clipped.targets is not None
    bound = np.abs(plain.targets.log_ratio) > 0.5
    assert clipped.diagnostics["target_clip_binds"] == bound.sum() > 0
    assert np.abs(clipped.targets.log_ratio).max() == pytest.approx(0.5)
    assert clipped.targets.target[~bound].tolist() == plain.targets.target[~bound].tolist()
    # The check is of the normaliser, not of the clip.
    assert clipped.diagnostics["normalisation_mean"] == plain.diagnostics["normalisation_mean"]
    assert clipped.diagnostics["largest_log_ratio_target"] <= 0.5 + 1e-12


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("qrpo", {"truncation": 0.3}),
        ("dpo", {"target_clip": 3.0}),
        ("a_star", {"normaliser": "finite"}),
        ("a_star", {"candidates": 8}),
        ("tup", {"tie_method": "mid"}),
        ("tup", {"loss": "mae"}),
        ("best_of_n", {"beta": 0.3}),
        ("best_of_n", {"value_beta": 0.3}),
    ],
)
def test_a_setting_of_another_kind_is_refused(
    settings: dict[str, Any], kind: str, setting: dict[str, Any]
) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"objective\.{name} does not belong to kind '{kind}'"):
        changed(settings, objective={"kind": kind} | setting)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("tup", {"truncation": 1.0}),
        ("tup", {"truncation": 1e-300}),
        ("best_of_n", {"candidates": 1}),
        ("best_of_n", {"candidates": 1e300}),
        ("a_star", {"value_beta": 0}),
        ("a_star", {"value_beta": 1e-300}),
        ("qrpo", {"beta": 1e-300}),
        ("dpo", {"beta": 1e300}),
        ("qrpo", {"beta": float("nan")}),
        ("qrpo", {"beta_max": 1e300}),
        ("qrpo", {"exponent": 1e300}),
        ("simpo", {"gamma_beta_ratio": 1e300}),
    ],
)
def test_values_out_of_range_are_refused(
    settings: dict[str, Any], kind: str, setting: dict[str, Any]
) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"objective\.{name} = .* is refused"):
        changed(settings, objective={"kind": kind} | setting)


def test_too_few_references_name_the_kind_of_target(settings: dict[str, Any], tmp_path: Path) -> None:
    from qrpo_core.pipeline.preflight import check

    few = {"sampling": settings["sampling"] | {"references_per_prompt": 1}}
    for kind, needed, why in (
        ("tup", 2, "'truncated_logit'"),
        ("a_star", 2, "'a_star'"),
        ("best_of_n", 3, "'log'"),
    ):
        asked = changed({**settings, **few}, objective={"kind": kind})
        with pytest.raises(ConfigError, match=rf"set it to {needed} or more \(.*{why}"):
            check(Workspace(asked))


def test_settings_of_other_kinds_leave_the_cache_keys_alone(settings: dict[str, Any]) -> None:
    own = {each.name for kind in KINDS.values() for each in kind.settings} | {"target_clip"}
    assert own & cache_key_fields(changed(settings).objective).keys() == set()
    asked = changed(settings, objective={"kind": "tup", "truncation": 0.3})
    assert cache_key_fields(asked.objective)["truncation"] == 0.3
