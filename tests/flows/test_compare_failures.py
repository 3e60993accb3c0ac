"""Comparisons in which a variant fails, and those that choose settings on validation prompts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from flows.service.server import PrefectServer
from qrpo_core.common.errors import DataError, QRPOError
from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.inspection.comparison_plan import comparison_plan_lines, plan_comparison
from qrpo_core.inspection.runs import run_lines
from qrpo_core.pipeline import prompts
from qrpo_core.pipeline.comparison import comparison_lines, result_of
from qrpo_core.pipeline.held_out_part import HeldOutPart
from qrpo_core.pipeline.run_ledger import RunLedger
from qrpo_core.pipeline.variants import expand
from qrpo_core.pipeline.workspace import Workspace
from tests.flows.test_compare import experiment, run

pytestmark = pytest.mark.slow

#: At this learning rate weights are not finite after a few steps, and the policy is refused.
TOO_LARGE = "1e30"


def test_a_variant_that_fails_is_named_and_the_others_are_compared(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.compare import VariantsFailed, compare

    wanted = experiment(tiny_model, tmp_path / "store")
    asked: dict[str, Any] = {"vary": (f"training.learning_rate=1e-3,{TOO_LARGE}",), "seeds": 1}
    with pytest.raises(VariantsFailed, match="1 trainings or evaluations failed") as raised:
        compare(wanted, ComparisonConfig(**asked))
    compared = raised.value.compared
    result = result_of(compared.manifest)
    assert compared.failed == result.failed == 1
    assert [each.variant for each in result.scorers[0].variants] == ["learning_rate 1e-3"]
    (error,) = result.facts_of(f"learning_rate {TOO_LARGE}").failed.values()
    assert error
    text = "\n".join(comparison_lines(Workspace(wanted), compared.manifest))
    assert f"Failed: learning_rate {TOO_LARGE}, seed 0: " in text
    assert "1 trainings or evaluations failed" in text

    with pytest.raises(QRPOError, match="all 1 trainings failed; the first, learning_rate"):
        compare(wanted, ComparisonConfig(vary=(f"training.learning_rate={TOO_LARGE}",), seeds=1))


def test_a_judge_without_any_score_is_refused_before_the_first_training(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.compare import compare

    (tmp_path / "silent.py").write_text("def judge(batch):\n    return [None for _ in batch]\n")
    monkeypatch.chdir(tmp_path)
    wanted = experiment(tiny_model, tmp_path / "store")
    silent = RewardConfig.model_validate({"kind": "python", "python": {"function": "silent.py:judge"}})
    judges = wanted.evaluation.judges | {"silent": silent}
    wanted = wanted.model_copy(update={"evaluation": wanted.evaluation.model_copy(update={"judges": judges})})
    with pytest.raises(DataError, match=r"has a score by evaluation\.judges\.silent"):
        compare(wanted, ComparisonConfig(vary=("training.learning_rate=1e-3,2e-3",), seeds=1))
    assert RunLedger(wanted.store).runs == []


def plan_of(wanted: Experiment, asked: dict[str, Any]) -> str:
    """What `qrpo compare --plan` prints."""
    config, workspace = ComparisonConfig(**asked), Workspace(wanted)
    planned = plan_comparison(workspace, expand(wanted, config), config)
    return "\n".join(comparison_plan_lines(workspace, planned, config))


def test_settings_are_chosen_on_other_prompts_and_seeds(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    wanted = experiment(tiny_model, tmp_path / "store")
    asked: dict[str, Any] = {
        "vary": ("objective.kind=qrpo,sft", "training.learning_rate=1e-3,3e-3"),
        "seeds": 1,
        "choose_on": "validation",
        "choose_by": "brevity",
    }
    compared, computed = run(wanted, **asked)
    assert computed["train policy"] == 4 + 2  # all to choose by, then the chosen ones
    result = result_of(compared.manifest)
    assert result.seeds == (1,)
    assert [each.group for each in result.choices] == ["qrpo", "sft"]
    assert {each.variant for each in result.variants} == {each.chosen for each in result.choices}
    for choice in result.choices:
        gains = {name: gain for name, gain in choice.candidates.items() if gain is not None}
        assert len(gains) == 2
        assert gains[choice.chosen] == max(gains.values())
    ledger = RunLedger(wanted.store)
    assert len({each.train.key for each in ledger.runs}) == len(ledger.runs) == 6
    assert {each.experiment and each.experiment["objective"]["kind"] for each in ledger.runs} == {
        "qrpo",
        "sft",
    }
    rows = Workspace(wanted).artifacts.file(compared.manifest, "rows.parquet")
    import pyarrow.parquet as pq

    table = pq.read_table(rows)
    tested = set(table["prompt_id"].to_pylist())
    assert len(tested) == result.prompts
    assert not any(HeldOutPart("validation", 0.5).mask(sorted(tested)))
    sizes = Counter(each.result and each.result.prompts for each in ledger.runs)
    (other,) = set(sizes) - {result.prompts}
    assert sizes == {other: 4, result.prompts: 2}  # each is evaluated on the prompts that count for it
    assert set(table["measure"].to_pylist()) == {"reward", "judge brevity", "log_ratio", "tokens", "cut"}
    _, computed = run(wanted, **asked)
    assert sum(computed.values()) == 0
    assert "at least 0 of these trainings" in (planned := plan_of(wanted, asked))
    assert "The store grows" not in planned
    assert "at least 2 of these trainings" in (planned := plan_of(wanted, asked | {"seeds": 2}))
    assert "The store grows" in planned

    lines = run_lines(RunLedger(wanted.store))
    assert sum("  qrpo  " in line for line in lines) == 3  # the objective of a row
    assert any("learning_rate 0.003" in line for line in lines)


def test_a_judge_without_a_score_of_one_variant_costs_that_cell_alone(
    server: PrefectServer, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = experiment(tiny_model, tmp_path / "store")
    workspace = Workspace(wanted)
    table = prompts.read(workspace).prompts
    rows = 2 * pc.sum(pc.equal(table["split"], "held_out")).as_py()  # of one policy
    # It scores the reference policy and the first variant, then never again.
    (tmp_path / "tired.py").write_text(
        "from pathlib import Path\n\n\n"
        "def judge(batch):\n"
        "    seen = Path('seen')\n"
        "    done = seen.stat().st_size if seen.exists() else 0\n"
        "    seen.write_text('x' * (done + len(batch)))\n"
        f"    return [float(len(each.completion)) if done < {2 * rows} else None for each in batch]\n"
    )
    monkeypatch.chdir(tmp_path)
    tired = RewardConfig.model_validate({"kind": "python", "python": {"function": "tired.py:judge"}})
    judges = wanted.evaluation.judges | {"tired": tired}
    wanted = wanted.model_copy(update={"evaluation": wanted.evaluation.model_copy(update={"judges": judges})})
    compared, _ = run(wanted, vary=("training.learning_rate=1e-3,2e-3",), seeds=1)
    assert compared.failed == 0
    result = result_of(compared.manifest)
    by_name = {each.scorer: each for each in result.scorers}
    assert by_name["judge tired"].silent == {"learning_rate 2e-3": 1}
    assert [each.variant for each in by_name["judge tired"].variants] == ["learning_rate 1e-3"]
    assert len(by_name["judge brevity"].variants) == len(by_name["reward"].variants) == 2
    text = "\n".join(comparison_lines(Workspace(wanted), compared.manifest))
    assert "no score" in text
    assert (
        "judge tired: no score of any completion of 1 of the trained policies of learning_rate 2e-3." in text
    )
    assert "no score" in Workspace(wanted).artifacts.read(compared.manifest, "comparison.html").decode()
