"""The trainer on the two-layer model: neither the division of a step nor a resumption changes its numbers."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Example, Pair
from qrpo_core.training.trainer import QRPOTrainer
from tests.core.training.runs import assert_same_run, history, history_of, load, make_trainer, run_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


class TestCuttingAStepChangesNothing:
    """11 items in steps of 4: the last step of an epoch has 3, so weighting by pass would show."""

    @pytest.fixture(scope="class")
    def large(
        self, tiny_model: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
    ) -> QRPOTrainer:
        trainer = run_trainer(examples, tiny_model, tmp_path_factory.mktemp("large"), max_tokens=10**6)
        assert [len(batches) for batches in trainer.get_train_dataloader()] == [1, 1, 1]
        assert len(history(trainer)) == 6
        return trainer

    @pytest.mark.parametrize(
        "cut",
        [
            {"max_tokens": 1},
            {"max_tokens": 30},
            {"per_device_train_batch_size": 3},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "batch_size": None},
        ],
        ids=str,
    )
    def test_accumulated_passes_are_the_large_batch(
        self,
        tiny_model: Path,
        examples: list[Example],
        tmp_path: Path,
        large: QRPOTrainer,
        cut: dict[str, int],
    ) -> None:
        small = run_trainer(examples, tiny_model, tmp_path, **cut)
        assert max(len(batches) for batches in small.get_train_dataloader()) > 1
        assert small.args.gradient_accumulation_steps == 1
        assert_same_run(large, small, tiny_model)

    def test_pairs_too(self, tiny_model: Path, pairs: list[Pair], tmp_path: Path) -> None:
        objective = ObjectiveConfig(kind="dpo")
        large = run_trainer(pairs, tiny_model, tmp_path / "a", objective=objective, max_tokens=10**6)
        small = run_trainer(pairs, tiny_model, tmp_path / "b", objective=objective, max_tokens=1)
        assert_same_run(large, small, tiny_model)

    def test_twenty_steps_packed_have_the_losses_of_one_item_a_pass(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path
    ) -> None:
        """Completions of three prompts, most of whose steps share one."""
        items = [
            replace(one, prompt_token_ids=examples[at % 3].prompt_token_ids)
            for at, one in enumerate(examples)
        ]
        settings = {"num_train_epochs": 7}
        one, packed = (
            run_trainer(items, tiny_model, tmp_path / str(tokens), max_tokens=tokens, **settings)
            for tokens in (1, 10**6)
        )
        losses = [[entry["loss"] for entry in history(trainer)] for trainer in (one, packed)]
        assert len(losses[0]) == 21
        # A loss near 0 is the square of a difference of log-probs: its error is measured by the mean loss.
        assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-5 * float(np.mean(losses[0])))
        shared = [e["shared_prefix_share"] for e in packed.state.log_history if "shared_prefix_share" in e]
        assert max(shared) > 0.1
        assert not any(e.get("shared_prefix_share") for e in one.state.log_history)

    def test_the_token_budget_holds(self, tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
        trainer = make_trainer(examples, load(tiny_model), tmp_path, batch_size=11, max_tokens=30)
        numbers = torch.get_rng_state()
        (batches,) = trainer.get_train_dataloader()
        assert torch.equal(torch.get_rng_state(), numbers), "dropout does not depend on how data are read"
        assert all(float(batch["computed"]) <= 30 for batch in batches)
        assert sum(float(batch["weight"].sum()) for batch in batches) == 11

    def test_order_within_a_step(self, tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
        one = run_trainer(examples, tiny_model, tmp_path / "a", batch_size=11, max_tokens=40)
        other = make_trainer(examples[::-1], load(tiny_model), tmp_path / "b", batch_size=11, max_tokens=40)
        other.train()
        assert_same_run(one, other, tiny_model)

    def test_computing_activations_again(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path, large: QRPOTrainer
    ) -> None:
        again = run_trainer(examples, tiny_model, tmp_path, max_tokens=10**6, activation_checkpointing=True)
        assert again.model.is_activation_checkpointing
        assert_same_run(large, again, tiny_model)


class TestResuming:
    SETTINGS: ClassVar[dict[str, Any]] = {"optim": "adamw_torch", "max_tokens": 30}

    @pytest.fixture(scope="class")
    def whole(
        self, tiny_model: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
    ) -> QRPOTrainer:
        """A run that leaves a checkpoint after every step; they change nothing."""
        out = tmp_path_factory.mktemp("whole")
        saved = run_trainer(examples, tiny_model, out, save_strategy="steps", save_steps=1, **self.SETTINGS)
        assert history(saved) == history(run_trainer(examples, tiny_model, out / "none", **self.SETTINGS))
        return saved

    @pytest.mark.parametrize("at", [2, 3, 4])
    def test_goes_on_as_if_nothing_had_happened(
        self, tiny_model: Path, examples: list[Example], whole: QRPOTrainer, tmp_path: Path, at: int
    ) -> None:
        """3 steps an epoch: cut within the first, between the two, and within the second."""
        resumed = make_trainer(examples, load(tiny_model), tmp_path, **self.SETTINGS)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{at}")
        assert history(whole) == history(resumed)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_epochs_are_in_orders_of_their_own(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path
    ) -> None:
        entries = history(run_trainer(examples, tiny_model, tmp_path, learning_rate=0.0))
        assert [e["target"] for e in entries[:3]] != [e["target"] for e in entries[3:]]
        sizes = np.array([4, 4, 3])
        means = [np.dot([e["target"] for e in part], sizes) / 11 for part in (entries[:3], entries[3:])]
        assert means == pytest.approx([np.mean([e.target for e in examples])] * 2)

    @pytest.mark.long
    def test_reading_ahead_in_another_process_changes_nothing(
        self,
        tiny_model: Path,
        examples: list[Example],
        whole: QRPOTrainer,
        server: ForkServerContext,
        tmp_path: Path,
    ) -> None:
        """In a process without threads, since the reader is a fork: Prefect's threads would break it."""
        settings = {"dataloader_num_workers": 1, **self.SETTINGS}
        with ProcessPoolExecutor(1, mp_context=server) as pool:
            there = pool.submit(history_of, examples, tiny_model, tmp_path, settings).result()
        assert history(whole) == there
