"""Comparisons of variants through the real flow: what is trained again, what fails, what is chosen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from flows.service.pages import with_pages
from flows.service.server import PrefectServer
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import parse_experiment
from qrpo_core.maintenance.in_use import stored_recipes, used_recipes
from qrpo_core.pipeline.comparison import comparison_lines, result_of
from qrpo_core.pipeline.workspace import Workspace
from tasks.page_links import page_address
from tests.flows.small import small

pytestmark = pytest.mark.slow


def experiment(model: Path, store: Path, **sections: dict[str, Any]) -> Experiment:
    settings = small(model, store)
    settings["prompts"] |= {"held_out": 0.5}
    settings |= {
        "name": "variants",
        "training_data": {"mode": "pairs"},
        "training": {"precision": "fp32", "batch_size": 2, "learning_rate": 1e-3},
        "evaluation": {
            "samples_per_prompt": 2,
            "resamples": 100,
            "judges": {"brevity": {"kind": "length", "max_words": 2}},
        },
    }
    return parse_experiment({**settings, **{n: settings.get(n, {}) | new for n, new in sections.items()}})


def run(wanted: Experiment, **asked: Any) -> tuple[Any, Counter[str]]:
    """The finished comparison, and how many rows or artifacts each stage computed."""
    from flows.compare import compare

    compared = compare(wanted, ComparisonConfig(**asked))
    computed: Counter[str] = Counter()
    for stage in compared.stages:
        computed[stage.stage] += stage.computed
    return compared, computed


def test_a_repetition_trains_nothing_and_one_objective_more_trains_that_one(
    server: PrefectServer, tiny_model: Path, tmp_path: Path
) -> None:
    wanted = experiment(tiny_model, tmp_path / "store")
    two = {"vary": ("objective.kind=qrpo,dpo",), "seeds": 2}
    first, computed = run(wanted, **two)
    assert computed["train policy"] == computed["evaluate policy"] == 4
    assert computed["compare policies"] == 1
    again, computed = run(wanted, **two)
    assert sum(computed.values()) == 0
    assert again.manifest == first.manifest

    three, computed = run(wanted, vary=("objective.kind=qrpo,dpo,sft",), seeds=2)
    assert computed["train policy"] == computed["evaluate policy"] == 2
    assert computed["sample references"] == computed["sample held-out, before"] == 0
    result = result_of(three.manifest)
    assert [each.scorer for each in result.scorers] == ["reward", "judge brevity"]
    assert {each.variant for each in result.variants} == {"qrpo", "dpo", "sft"}
    assert len(result.scorers[0].pairs) == 3
    page = Workspace(wanted).artifacts.read(three.manifest, "comparison.html").decode()
    assert "Reward against KL" in page
    assert "judge brevity" in page
    served = TestClient(with_pages(PlainTextResponse(""), [wanted.store.path]))
    runs, address = served.get("/qrpo/runs").text, page_address(three.manifest)
    assert f'<a href="{address}">variants, {three.manifest.created[:10]} ' in runs
    assert runs.index(address) < runs.index(page_address(first.manifest))  # the newest first
    assert served.get(address).text == page
    lines = comparison_lines(Workspace(wanted), three.manifest)
    assert any(line.startswith("reward: ") for line in lines)

    # The experiment alone would train qrpo; the comparison keeps what it compares.
    workspace = Workspace(wanted)
    stored = stored_recipes(workspace)
    kept = used_recipes(workspace, stored).kept
    assert {each.key for each in stored if each.step == "train"} <= kept
    assert len([each for each in stored if each.step == "train"]) == 6
