"""The trainer on the two-layer model: what may not change its numbers, and that they come out at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments

from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Collator, Example, Item, Pair
from qrpo_core.engines.base import ScoreRequest
from qrpo_core.engines.hf import TransformersEngine
from qrpo_core.errors import ConfigError, DataError
from qrpo_core.train.trainer import QRPOTrainer
from tests.rounding import reordered

BETA = 0.5
KINDS = ("qrpo", "dpo", "simpo", "rebel", "sft")

# peft asks transformers for a name that is about to go.
#: Operations from a weight to a log-prob, and from there to the gradient norm: see test_distributed.
SCORING, GRADIENT = 2_000, reordered(4_000, condition=4)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    """Eleven completions of unequal length whose stored log-probs are the model's own."""
    random, model = np.random.default_rng(0), load(tiny_model)
    made = []
    for row in range(11):
        prompt, completion = (
            random.integers(0, 256, size=n).tolist() for n in (3 + row % 3, 2 + 3 * row % 7)
        )
        tokens = torch.tensor([[*prompt, *completion]])
        logprobs = model(input_ids=tokens).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        reference = float(logprobs.gather(1, torch.tensor(completion)[:, None]).sum().detach())
        target, reward = random.normal(size=2).tolist()
        made.append(Example(prompt, completion, target, BETA, reference, reward))
    return made


@pytest.fixture(scope="module")
def pairs(examples: list[Example]) -> list[Pair]:
    """Ten pairs, none of them tied: references that are not quite the model's."""
    neighbours = enumerate(pairwise(examples))
    return [Pair(replace(a, ref_logprob=a.ref_logprob - 0.1 * (i + 1)), b) for i, (a, b) in neighbours]


def unknown(items: Sequence[Example]) -> float:
    """How far two computations of one of their log-ratios may lie apart, in nats."""
    return reordered(SCORING) * max(abs(item.ref_logprob) for item in items)


def make(
    items: Sequence[Item],
    model: Any,
    out: Path,
    *,
    objective: ObjectiveConfig = ObjectiveConfig(beta=BETA),  # noqa: B008
    batch_size: int | None = 4,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    **settings: Any,
) -> QRPOTrainer:
    known = {"use_cpu": True, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1}
    known |= {"save_strategy": "no", "disable_tqdm": True, "optim": "sgd", "num_train_epochs": 2}
    arguments = TrainingArguments(str(out), **(known | settings))
    made = QRPOTrainer(
        model,
        arguments,
        items,
        objective=objective,
        batch_size=batch_size,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    made.remove_callback(PrinterCallback)
    return made


def train(items: Sequence[Item], directory: Path, out: Path, **settings: Any) -> QRPOTrainer:
    trainer = make(items, load(directory), out, **settings)
    trainer.train()
    return trainer


def history(trainer: QRPOTrainer) -> list[dict[str, float]]:
    """What each step logged, without what depends on the machine or on how a step is cut."""
    dropped = ("tokens_per_second", "peak_memory_gb", "padding_share")
    return [
        {name: value for name, value in entry.items() if name not in dropped}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def history_of(items: Sequence[Item], directory: Path, out: Path, settings: dict[str, Any]) -> Any:
    """`history` of a run with these settings: what another process can be asked for."""
    return history(train(items, directory, out, **settings))


def assert_same_run(one: QRPOTrainer, other: QRPOTrainer, start: Path) -> None:
    """Each step adds its own difference to the weights, and so to everything that is logged after it.

    The log-ratios of the first step are rounding alone, and so are their signs, which are not compared.
    """
    assert len(history(one)) == len(history(other)) > 0
    for step, (here, there) in enumerate(zip(history(one), history(other), strict=True), 1):
        assert here.keys() == there.keys()
        if "sign_agreement" in here:  # it jumps where rounding decides a sign; log-ratios are compared
            there = there | {"sign_agreement": here["sign_agreement"]}
        assert here == pytest.approx(there, rel=step * GRADIENT, abs=step * GRADIENT)
    weights = [list(trainer.model.parameters()) for trainer in (one, other)]
    moved = distance(weights[0], load(start).parameters())
    assert distance(*weights) <= len(history(one)) * GRADIENT * moved


def distance(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    pairs = zip(one, other, strict=True)
    return float(sum(((a.detach() - b.detach()).double() ** 2).sum() for a, b in pairs)) ** 0.5


def test_the_first_loss_is_the_mean_squared_target(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    first = history(train(examples, tiny_model, tmp_path, batch_size=11))[0]
    assert first["log_ratio"] == pytest.approx(0.0, abs=unknown(examples))
    assert first["kl"] == pytest.approx(0.0, abs=unknown(examples) ** 2)
    assert first["loss"] == pytest.approx(np.mean([e.target**2 for e in examples]), abs=4 * unknown(examples))
    assert first["target"] == pytest.approx(np.mean([e.target for e in examples]))
    assert first["log_ratio_target"] == pytest.approx(np.mean([e.target / BETA for e in examples]))
    assert first["completion_tokens"] == pytest.approx(np.mean([len(e.token_ids) for e in examples]))


@pytest.mark.parametrize(("batch_size", "first"), [(11, 1.0), (3, 0.0)])
def test_an_only_step_has_no_warm_up(
    tiny_model: Path, examples: list[Example], tmp_path: Path, batch_size: int, first: float
) -> None:
    """A share of four steps is one step at least, which has learning rate 0; of one step it is none."""
    settings = {
        "learning_rate": 1e-3,
        "warmup_steps": 0.1,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1,
    }
    trainer = train(examples, tiny_model, tmp_path, batch_size=batch_size, **settings)
    assert history(trainer)[0]["learning_rate"] == pytest.approx(first * 1e-3)


@pytest.mark.parametrize("temperature", [0.7, 1.2])
def test_at_a_temperature_the_policy_is_the_tempered_one(
    tiny_model: Path, examples: list[Example], tmp_path: Path, temperature: float
) -> None:
    """Reference log-probs at the temperature make the first log-ratio 0; those at 1 do not."""
    asked = [ScoreRequest(tuple(e.prompt_token_ids), tuple(e.token_ids)) for e in examples]
    scored = TransformersEngine(tiny_model, "float32").logprobs(asked, temperature=temperature)
    items = [replace(e, ref_logprob=float(value)) for e, value in zip(examples, scored, strict=True)]
    trainer = train(items, tiny_model, tmp_path / "all", batch_size=11, temperature=temperature)
    first = history(trainer)[0]
    assert first["log_ratio"] == pytest.approx(0.0, abs=unknown(items))
    assert first["loss"] == pytest.approx(np.mean([e.target**2 for e in examples]), abs=4 * unknown(items))
    other = history(train(examples, tiny_model, tmp_path / "at 1", batch_size=11, temperature=temperature))[0]
    expected = np.mean([value - e.ref_logprob for e, value in zip(examples, scored, strict=True)])
    assert other["log_ratio"] == pytest.approx(expected, abs=unknown(examples))
    assert abs(expected) > 1


def test_an_impossible_temperature_is_refused(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="temperature 0"):
        make(examples, load(tiny_model), tmp_path, temperature=0)


class TestCuttingAStepChangesNothing:
    """11 items in steps of 4: the last step of an epoch has 3, so weighting by pass would show."""

    @pytest.fixture(scope="class")
    def large(
        self, tiny_model: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
    ) -> QRPOTrainer:
        trainer = train(examples, tiny_model, tmp_path_factory.mktemp("large"), max_tokens=10**6)
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
        small = train(examples, tiny_model, tmp_path, **cut)
        assert max(len(batches) for batches in small.get_train_dataloader()) > 1
        assert small.args.gradient_accumulation_steps == 1
        assert_same_run(large, small, tiny_model)

    def test_pairs_too(self, tiny_model: Path, pairs: list[Pair], tmp_path: Path) -> None:
        objective = ObjectiveConfig(kind="dpo")
        large = train(pairs, tiny_model, tmp_path / "a", objective=objective, max_tokens=10**6)
        small = train(pairs, tiny_model, tmp_path / "b", objective=objective, max_tokens=1)
        assert_same_run(large, small, tiny_model)

    def test_the_token_budget_holds(self, tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
        trainer = make(examples, load(tiny_model), tmp_path, batch_size=11, max_tokens=30)
        numbers = torch.get_rng_state()
        (batches,) = trainer.get_train_dataloader()
        assert torch.equal(torch.get_rng_state(), numbers), "dropout does not depend on how data are read"
        assert all(batch["input_ids"].numel() <= 30 for batch in batches)
        assert sum(float(batch["weight"].sum()) for batch in batches) == 11

    def test_order_within_a_step_and_padding(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path
    ) -> None:
        one = train(examples, tiny_model, tmp_path / "a", batch_size=11, max_tokens=40)
        other = make(examples[::-1], load(tiny_model), tmp_path / "b", batch_size=11, max_tokens=40)
        other.data_collator = Collator(7)  # another token fills the rows, and rows are wider
        other.train()
        assert_same_run(one, other, tiny_model)

    def test_computing_activations_again(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path, large: QRPOTrainer
    ) -> None:
        again = train(examples, tiny_model, tmp_path, max_tokens=10**6, activation_checkpointing=True)
        assert again.model.is_activation_checkpointing
        assert_same_run(large, again, tiny_model)


def test_bfloat16_is_close(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    exact = history(train(examples, tiny_model, tmp_path / "a", num_train_epochs=1))
    mixed = train(examples, tiny_model, tmp_path / "b", num_train_epochs=1, bf16=True)
    assert {weight.dtype for weight in mixed.model.parameters()} == {torch.float32}
    nats = 0.3  # 8 tokens, whose logits of up to 8 are known to 1/32
    for one, two in zip(exact, history(mixed), strict=True):
        assert one["log_ratio"] == pytest.approx(two["log_ratio"], abs=nats)
        # The root mean square of residuals moves by no more than beta times the log-ratios do.
        assert one["loss"] ** 0.5 == pytest.approx(two["loss"] ** 0.5, abs=BETA * nats)
    assert history(mixed)[0]["log_ratio"] != exact[0]["log_ratio"]


class TestResuming:
    SETTINGS: ClassVar[dict[str, Any]] = {"optim": "adamw_torch", "max_tokens": 30}

    @pytest.fixture(scope="class")
    def whole(
        self, tiny_model: Path, examples: list[Example], tmp_path_factory: pytest.TempPathFactory
    ) -> QRPOTrainer:
        """A run that leaves a checkpoint after every step; they change nothing."""
        out = tmp_path_factory.mktemp("whole")
        saved = train(examples, tiny_model, out, save_strategy="steps", save_steps=1, **self.SETTINGS)
        assert history(saved) == history(train(examples, tiny_model, out / "none", **self.SETTINGS))
        return saved

    @pytest.mark.parametrize("at", [2, 3, 4])
    def test_goes_on_as_if_nothing_had_happened(
        self, tiny_model: Path, examples: list[Example], whole: QRPOTrainer, tmp_path: Path, at: int
    ) -> None:
        """3 steps an epoch: cut within the first, between the two, and within the second."""
        resumed = make(examples, load(tiny_model), tmp_path, **self.SETTINGS)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{at}")
        assert history(whole) == history(resumed)
        for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_epochs_are_in_orders_of_their_own(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path
    ) -> None:
        entries = history(train(examples, tiny_model, tmp_path, learning_rate=0.0))
        assert [e["target"] for e in entries[:3]] != [e["target"] for e in entries[3:]]
        sizes = np.array([4, 4, 3])
        means = [np.dot([e["target"] for e in part], sizes) / 11 for part in (entries[:3], entries[3:])]
        assert means == pytest.approx([np.mean([e.target for e in examples])] * 2)

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


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_brings_its_loss_down(
    tiny_model: Path, examples: list[Example], pairs: list[Pair], tmp_path: Path, kind: Any
) -> None:
    objective = ObjectiveConfig(kind=kind, beta=BETA)
    items: Sequence[Item] = pairs if objective.pairwise else examples
    settings: dict[str, Any] = {"optim": "adamw_torch", "num_train_epochs": 20, "batch_size": 11}
    settings["learning_rate"] = 1e-3
    entries = history(train(items, tiny_model, tmp_path, objective=objective, max_tokens=99, **settings))
    assert entries[-1]["loss"] < 0.6 * entries[0]["loss"]
    if kind == "qrpo":
        assert entries[-1]["sign_agreement"] >= 0.9
    if kind == "dpo":
        assert entries[-1]["accuracy"] == 1
        assert entries[-1]["margin"] > 0


def test_only_the_adapters_change(tiny_model: Path, examples: list[Example], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load(tiny_model), LoraConfig(r=2, target_modules="all-linear"))
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    trainer = make(examples, adapted, tmp_path, optim="adamw_torch", max_tokens=30)
    trainer.train()
    changed = {n for n, weight in adapted.named_parameters() if not torch.equal(weight.detach(), before[n])}
    assert changed == {name for name in before if ".lora_" in name}
    assert history(trainer)[-1]["loss"] < history(trainer)[0]["loss"] * 2
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dataloader_drop_last": True}, "dataloader_drop_last"),
            ({"auto_find_batch_size": True}, "auto_find_batch_size: set max_tokens"),
            ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
            ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "num_steps"),
        ],
    )
    def test_arguments_that_would_be_ignored(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path, settings: Any, message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            make(examples, load(tiny_model), tmp_path, **settings)

    def test_data_of_its_own_to_evaluate_on(
        self, tiny_model: Path, examples: list[Example], tmp_path: Path
    ) -> None:
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(ConfigError, match="does not support eval_dataset"):
            QRPOTrainer(load(tiny_model), arguments, examples, eval_dataset=examples)
        for name in ("max_tokens", "batch_size"):
            with pytest.raises(ConfigError, match=f"{name} is 0"):
                QRPOTrainer(load(tiny_model), arguments, examples, **{name: 0})

    def test_a_sequence_beyond_the_model(self, tiny_model: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"sequence of 513 tokens exceeds the model's 512 \[item 0\]"):
            make([Example([1], [2] * 512, ref_logprob=-1.0)], load(tiny_model), tmp_path)


def test_a_loss_that_is_not_a_number_is_seen(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    model = load(tiny_model)
    trainer = make(examples, model, tmp_path, logging_nan_inf_filter=True)
    model.model.norm.weight.data[:] = float("nan")
    trainer.train()
    assert np.isnan(history(trainer)[0]["loss"])


def test_targets_stay_float64_under_deepspeed(
    tiny_model: Path, examples: list[Example], tmp_path: Path
) -> None:
    """The Trainer would cast every float to DeepSpeed's dtype."""
    trainer = make(examples, load(tiny_model), tmp_path)
    trainer.is_deepspeed_enabled = True
    batch = trainer._prepare_inputs(Collator(0)(examples))
    assert batch["target"].dtype == batch["ref_logprob"].dtype == torch.float64


def test_fsdp_rounds_neither_log_probs_nor_gradients() -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    QRPOTrainer._keep_full_precision(SimpleNamespace(accelerator=accelerator))  # type: ignore[arg-type]
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        torch.bfloat16,
        torch.float32,
        None,
    )
