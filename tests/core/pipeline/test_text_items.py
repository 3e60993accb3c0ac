"""Items from rows of text are those that the pipeline trains on, and the trainer takes exported data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

from qrpo_core.common.errors import DataError
from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import ExampleColumns, PairColumns
from qrpo_core.inspection.data_set import export
from qrpo_core.pipeline.text_items import text_items
from qrpo_core.pipeline.training_targets import derive
from qrpo_core.training.trainer import QRPOTrainer
from tests.core.small_experiment import changed, precompute

NUMBERS = ("target", "beta", "log_partition")


def offline(settings: dict[str, Any]) -> Any:
    """The steps of an experiment that trains on a data set's own completions, ranked among sampled ones."""
    rows = [{"prompt": f"Say {n}", "answer": n, "good": f"yes {n}"} for n in range(12)]
    Path(settings["prompts"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return precompute(
        changed(
            settings,
            prompts=settings["prompts"] | {"completion_fields": ["good"]},
            training_data={"mode": "offline", "references": "sampled", "rewards": "scored"},
            objective={"beta": 0.3},
        )
    )[0]


def test_items_of_text_are_those_of_the_pipeline(settings: dict[str, Any], tmp_path: Path) -> None:
    steps = offline(settings)
    workspace = steps.workspace
    data = derive(workspace, workspace.artifacts.get(steps.first.training_set_recipe))
    made = export(workspace, tmp_path / "data")
    trained = datasets.load_dataset(
        str(made.folder), "training_set", split="train", cache_dir=str(tmp_path / "cache")
    )
    drawn = steps.first.references.read()
    rewards: dict[str, list[float]] = {}
    for prompt, reward in zip(drawn["prompt_id"].to_pylist(), drawn["reward"].to_pylist(), strict=True):
        rewards.setdefault(prompt, []).append(reward)
    rows = [
        {"prompt": row["messages"], "completion": row["text"], "reward": row["reward"]}
        | {"reference_rewards": rewards[row["prompt_id"]]}
        for row in trained
    ]
    objective = ObjectiveConfig(beta=0.3)
    found = text_items(datasets.Dataset.from_list(rows), settings["model"]["path"], objective=objective)
    wanted = data.items()
    assert isinstance(found, ExampleColumns)
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert list(one.prompt_token_ids) == list(two.prompt_token_ids)
        assert list(one.token_ids) == list(two.token_ids)
        assert [getattr(one, name) for name in NUMBERS] == [getattr(two, name) for name in NUMBERS]
        # Other rows in a batch: float32 sums of up to 20 log-probs in another order.
        assert one.ref_logprob == pytest.approx(two.ref_logprob, rel=1e-5)


def test_the_trainer_takes_the_exported_training_set(settings: dict[str, Any], tmp_path: Path) -> None:
    steps = offline(settings)
    data = derive(steps.workspace, steps.workspace.artifacts.get(steps.first.training_set_recipe))
    made = export(steps.workspace, tmp_path / "data")
    exported = datasets.load_dataset(
        str(made.folder), "training_set", split="train", cache_dir=str(tmp_path / "cache")
    )

    def losses(items: Any) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(settings["model"]["path"], dtype=torch.float32)
        arguments = TrainingArguments(
            str(tmp_path / "out"), use_cpu=True, num_train_epochs=1, logging_steps=1
        )
        trainer = QRPOTrainer(
            model, arguments, items, objective=ObjectiveConfig(beta=0.3), batch_size=4, max_tokens=512
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(exported) == losses(data.items())
    shuffled = exported.select(range(5, 0, -1))  # a view with an order of its own
    assert [list(item.token_ids) for item in ExampleColumns.of_data_set(shuffled)] == shuffled["token_ids"][:]
    with pytest.raises(DataError, match="text_items"):
        losses(exported.remove_columns("token_ids"))


def test_pairs_of_text(tiny_model: Path) -> None:
    rows = datasets.Dataset.from_list(
        [
            {
                "prompt": f"Say {n}",
                "chosen": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "yes"}],
                "rejected": "no",
                "ref_logprob_chosen": -3.0 - n,
                "ref_logprob_rejected": -5.0,
            }
            for n in range(3)
        ]
    )
    found = text_items(rows, tiny_model, objective=ObjectiveConfig(kind="dpo"))
    assert isinstance(found, PairColumns)
    assert [(pair.chosen.ref_logprob, pair.rejected.ref_logprob) for pair in found] == [
        (-3.0 - n, -5.0) for n in range(3)
    ]
    assert all(len(pair.chosen.token_ids) == 4 for pair in found)  # y, e, s and the end of the turn
    plain = text_items(
        [{"prompt": "Say 1", "completion": "one"}], tiny_model, objective=ObjectiveConfig(kind="sft")
    )
    assert [len(item.token_ids) for item in plain] == [4]


def test_quantiles_of_a_completion_that_is_a_reference_leave_it_out(tiny_model: Path) -> None:
    row = {"prompt": "Say 1", "completion": "one", "reward": 2.0, "reference_rewards": [1.0, 2.0, 3.0]}
    known = {"ref_logprob": -4.0}
    inside = text_items([row | known], tiny_model, in_pool=True)[0]
    outside = text_items([row | known], tiny_model)[0]
    # Among the two others it is above one; among all three it is above one and equal to another.
    assert inside.target != outside.target
    assert np.isfinite([inside.target, outside.target]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"completion": None}, "without a completion"),
        ({"reward": None}, "no reward"),
        ({"reference_rewards": []}, "no reference_rewards"),
        ({"prompt": ""}, "empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tiny_model: Path, change: dict[str, Any], says: str) -> None:
    good = {"prompt": "Say 1", "completion": "1", "reward": 1.0, "reference_rewards": [0.0, 1.0]}
    with pytest.raises(DataError, match=says) as refused:
        text_items([good, {**good, "prompt": "Say 2", **change}], tiny_model)
    assert "row 1" in str(refused.value)
    with pytest.raises(DataError, match="other reference_rewards"):
        text_items([good, good | {"reference_rewards": [0.0]}], tiny_model)
    with pytest.raises(DataError, match="no rows"):
        text_items([], tiny_model)
