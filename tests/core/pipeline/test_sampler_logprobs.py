"""Reference log-probs from the sampler: the formula by hand, refusals, and equality where it is exact."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.common.schemas import COMPARED_LOGPROBS, COMPLETIONS, LOGPROBS, TRAINING_SET
from qrpo_core.config import Experiment
from qrpo_core.inspection.plan import plan
from qrpo_core.pipeline import sampler_logprobs
from qrpo_core.pipeline.sampler_logprobs import differences, refuse_far, some_of_each_engine, summary
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.store.blocks.planning import count_rows
from tests.core.small_experiment import changed, precompute


def compared(*rows: tuple[str, int, str, float, float]) -> pa.Table:
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=COMPARED_LOGPROBS)


def test_the_differences_by_hand() -> None:
    """Targets 0, 1, 2, 3 have the standard deviation sqrt(1.25); each row has a beta of its own."""
    table = pa.table({"prompt_id": ["a", "a", "b", "b"], "sample_index": [0, 1, 0, 1]})
    targets: Any = SimpleNamespace(target=np.arange(4.0), beta=np.array([0.1, 0.1, 0.2, 0.2]))
    rows = compared(
        ("a", 0, "x", -1.0, -4.0),
        ("b", 1, "x", -2.0, 2.0),
        ("b", 0, "y", -5.0, -5.0),
        ("c", 0, "z", -5.0, -5.0),
    )
    x, y, z = differences(rows, table, targets)
    assert (x.engine, x.rows, x.largest) == ("x", 2, 4.0)
    assert x.rms == pytest.approx(math.sqrt((3**2 + 4**2) / 2))
    assert x.share == pytest.approx(math.sqrt((0.3**2 + 0.8**2) / 2 / 1.25))
    assert (y.engine, y.rms, y.share) == ("y", 0.0, 0.0)
    assert (z.engine, z.rows, z.share) == ("z", 0, math.inf)  # none of its rows has a target
    refuse_far([x, y], limit=0.6)
    for each in ([x, y], [y, z]):
        with pytest.raises(EngineError, match=r"parity.reference_limit is 5.0 %"):
            refuse_far(each, limit=0.05)


wanted = st.dictionaries(st.text("ab", min_size=1, max_size=4), st.integers(1, 5), min_size=1)


@given(wanted, st.integers(1, 6))
def test_the_same_rows_are_compared_in_any_order(sizes: dict[str, int], count: int) -> None:
    rows = {prompt: tuple(range(size)) for prompt, size in sizes.items()}
    chosen = some_of_each_engine(None, rows, count)
    assert count_rows(chosen) == min(count, count_rows(rows))
    assert all(set(indices) <= set(rows[prompt]) for prompt, indices in chosen.items())
    assert some_of_each_engine(None, dict(reversed(rows.items())), count) == chosen
    # More rows replace some of those that are compared, and compare none that is not there.
    assert count_rows(some_of_each_engine(None, rows, 10**6)) == count_rows(rows)


def asked(settings: dict[str, Any], **sections: Any) -> Experiment:
    training_data = {"reference_logprobs": "sampler"} | sections.pop("training_data", {})
    sampling = {"engine": "transformers"} | sections.pop("sampling", {})
    return changed(settings, training_data=training_data, sampling=sampling, **sections)


def test_an_exact_sampler_gives_the_training_models_numbers(settings: dict[str, Any]) -> None:
    """float32 on both sides: the training set has the sampler's numbers, and they are the model's."""
    few = asked(settings, parity={"reference_rows": 5})
    steps, computed = precompute(few)
    workspace, first = steps.workspace, steps.first
    assert computed["score reference log-probs"] == 5
    manifest = workspace.artifacts.get(first.training_set_recipe)
    table = workspace.load(manifest, "training_set.parquet", TRAINING_SET)
    pairs = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
    drawn = workspace.blocks.read_rows(first.rewards.completions.recipe, pairs, COMPLETIONS)
    assert set(drawn["finish_reason"].to_pylist()) <= {"stop", "length"}
    assert table["ref_logprob"].to_pylist() == drawn["logprob"].to_pylist()

    of_policy, computed = precompute(asked(settings, training_data={"reference_logprobs": "policy"}))
    assert computed["score reference log-probs"] == len(table) - 5, "the compared rows are not computed again"
    assert of_policy.first.training_set_recipe != first.training_set_recipe
    assert of_policy.first.quantiles_recipe == first.quantiles_recipe
    scored = workspace.blocks.read_rows(first.logprobs.recipe, pairs, LOGPROBS)
    # Sums of up to 12 terms below 10 nats, in float32, by another order of the same products.
    np.testing.assert_allclose(table["ref_logprob"], scored["logprob"], atol=1e-3, rtol=0)

    data = derive(workspace, manifest)
    (one,) = data.compared
    assert one.engine == "transformers/cpu/float32"
    assert one.rows == 5
    assert one.share < 0.01
    assert data.diagnostics["reference_logprobs"] == summary(data.compared)
    assert first.check_reference_logprobs() == summary(data.compared)
    assert of_policy.first.check_reference_logprobs() == ""
    (stage,) = (each for each in plan(workspace) if each.stage == "score reference log-probs")
    assert (stage.present, stage.missing) == (5, 0)
    assert "compared on these rows" in stage.note


def test_a_sampler_of_another_policy_is_refused(settings: dict[str, Any]) -> None:
    """The fake engine draws from no policy: its numbers are whole nats away."""
    steps, _ = precompute(asked(settings, sampling={"engine": "fake"}))
    with pytest.raises(EngineError, match=r"parity.reference_limit is 5.0 %") as caught:
        steps.first.check_reference_logprobs()
    line = str(caught.value)
    assert "completions by fake" in line
    assert "set training_data.reference_logprobs to policy" in line
    assert "\n" not in line
    wide, _ = precompute(asked(settings, sampling={"engine": "fake"}, parity={"reference_limit": 1e6}))
    assert wide.first.training_set_recipe == steps.first.training_set_recipe
    assert "differs by" in wide.first.check_reference_logprobs()


def test_every_engine_of_a_pool_is_compared(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows of each engine, however rare: the names in the rows decide, not the settings."""
    steps, _ = precompute(asked(settings))
    completions, rows = steps.first.rewards.completions, steps.first.rewards.completions.wanted
    pairs = [(prompt, index) for prompt, indices in rows.items() for index in indices]
    engines = {pair: "rare" if place < 3 else "common" for place, pair in enumerate(pairs)}
    monkeypatch.setattr(
        sampler_logprobs, "_engines", lambda completions, pairs: [engines[tuple(pair)] for pair in pairs]
    )
    chosen = some_of_each_engine(completions, rows, 4)
    names = [engines[prompt, index] for prompt, indices in chosen.items() for index in indices]
    assert sorted(names) == ["common"] * 4 + ["rare"] * 3


def test_rows_without_log_probs_are_refused_by_name(settings: dict[str, Any]) -> None:
    drawn = pa.table({"logprob": pa.array([-1.0, None]), "engine": ["vllm/cuda", "old"]})
    with pytest.raises(EngineError, match="1 of 2 completions have no log-prob") as caught:
        sampler_logprobs.reported([("a", 0), ("b", 7)], drawn)
    assert caught.value.where == "prompt b, sample 7, engine old"
    whole = drawn.slice(0, 1)
    assert pc.sum(sampler_logprobs.reported([("a", 0)], whole)).as_py() == -1.0


def test_a_later_round_computes_its_reference_log_probs(settings: dict[str, Any]) -> None:
    wanted = asked(settings, rounds={"count": 2})
    assert sampler_logprobs.rows_to_compare(wanted, 1) == 64
    assert sampler_logprobs.rows_to_compare(wanted, 2) == 0


REFUSED = [
    ({"sampling": {"temperature": 0.7}}, "training is at 0.7"),
    ({"training_data": {"mode": "pairs"}, "objective": {"kind": "dpo"}}, "objective.kind 'dpo'"),
    ({"training_data": {"mode": "offline"}}, "reference_logprobs does not belong to mode 'offline'"),
]


@pytest.mark.parametrize(("sections", "says"), REFUSED)
def test_what_the_sampler_cannot_know_is_refused_in_one_line(
    settings: dict[str, Any], sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(settings, **sections)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
