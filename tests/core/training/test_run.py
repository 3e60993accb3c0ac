"""`train_policy` in one process: what it writes, what it returns, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState

from qrpo_core.common.errors import ConfigError, DataError, ModelError, ObjectiveError, QRPOError, StoreError
from qrpo_core.config import ObjectiveConfig, TrainingConfig
from qrpo_core.data.collator import Example, Item, Pair
from qrpo_core.models.loading import load_model, load_tokenizer
from qrpo_core.models.rounding import stochastic_bfloat16
from qrpo_core.training.__main__ import main
from qrpo_core.training.launch import FAILURE, HISTORY, _failure, read_job, write_job
from qrpo_core.training.run import _StepReporter, _training_digest, train_policy
from tests.rounding import reordered


def example(row: int) -> Example:
    draw = np.random.default_rng(row)
    prompt, tokens = (draw.integers(0, 256, size).tolist() for size in (3 + row % 3, 2 + row % 5))
    return Example(prompt, tokens, float(draw.normal()), 0.5, float(-10 - draw.random()), float(row % 2))


EXAMPLES = [example(row) for row in range(10)]


def train(model: Path, folder: Path, items: list[Any] = EXAMPLES, **training: Any) -> list[dict[str, float]]:
    settings = {"precision": "fp32", "batch_size": 4, "learning_rate": 1e-3} | training
    on_step = settings.pop("on_step", None)
    return train_policy(
        items,
        model,
        folder / "policy",
        objective=ObjectiveConfig(beta=0.5),
        training=TrainingConfig.model_validate(settings),
        work=folder / "work",
        on_step=on_step,
    ).history


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None]).logits  # type: ignore[no-any-return]


def test_every_step_is_returned_and_reported(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, float]] = []
    history = train(
        tiny_model, tmp_path, epochs=2, on_step=lambda *step: seen.append((*step[:2], step[2]["loss"]))
    )
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert seen == [(step, 6, entry["loss"]) for step, entry in enumerate(history, start=1)]
    rates = [entry["learning_rate"] for entry in history]
    assert rates == pytest.approx(1e-3 * np.array([0, *(0.5 + 0.5 * np.cos(np.pi * np.arange(5) / 5))]))


def test_an_only_step_is_taken_at_the_whole_rate(tiny_model: Path, tmp_path: Path) -> None:
    for schedule in ("cosine", "linear", "constant_with_warmup"):
        history = train(tiny_model, tmp_path / schedule, batch_size=128, schedule=schedule)
        assert [entry["learning_rate"] for entry in history] == [1e-3]
        trained = load_model(tmp_path / schedule / "policy", "float32")
        assert not torch.equal(logits(trained), logits(load_model(tiny_model, "float32")))


def identity(items: list[Any], directory: Path, **training: Any) -> str:
    return _training_digest(
        items, directory, ObjectiveConfig(beta=0.5), TrainingConfig.model_validate(training)
    )


def test_the_identity_of_a_training_has_everything_that_decides_its_losses(
    tiny_model: Path, make_tiny_model: Any, tmp_path: Path
) -> None:
    first, second, *rest = EXAMPLES
    shorter, longer = first.token_ids[:-1], [*first.prompt_token_ids, first.token_ids[0]]
    last = [*first.token_ids[:-1], (first.token_ids[-1] + 1) % 256]
    changed = {
        "as it is": EXAMPLES,
        "another token": [replace(first, token_ids=last), second, *rest],
        "another prompt token": [replace(first, prompt_token_ids=last), second, *rest],
        "a token less": [replace(first, token_ids=shorter), second, *rest],
        "the border moved": [
            replace(first, prompt_token_ids=longer, token_ids=first.token_ids[1:]),
            second,
            *rest,
        ],
        "two rows changed places": [second, first, *rest],
        "pairs of the same rows": [Pair(*pair) for pair in zip(EXAMPLES[::2], EXAMPLES[1::2], strict=True)],
    } | {
        name: [replace(first, **{name: getattr(first, name) + 0.5}), second, *rest]
        for name in ("target", "beta", "ref_logprob", "reward")
    }
    names = {identity(items, tiny_model): name for name, items in changed.items()}
    assert set(names.values()) == set(changed)
    assert identity([replace(first, token_ids=np.array(first.token_ids)), second, *rest], tiny_model) in names
    names[identity(EXAMPLES, tiny_model, temperature=0.7)] = "temperature"
    names[identity(EXAMPLES, tiny_model, seed=1)] = "seed"
    other = make_tiny_model(tmp_path / "other")
    (other / "merges.txt").write_text("another tokenizer")
    names[identity(EXAMPLES, other)] = "policy"
    assert len(names) == len(changed) + 3
    assert identity(EXAMPLES, tiny_model, temperature=1.0) == identity(EXAMPLES, tiny_model)
    assert identity(EXAMPLES, tiny_model, save_dtype="bfloat16") == identity(EXAMPLES, tiny_model)
    assert identity(EXAMPLES, tiny_model, micro_batch_tokens=64) == identity(EXAMPLES, tiny_model)


def test_a_checkpoint_of_a_training_on_other_tokens_is_not_gone_on_from(
    tiny_model: Path, tmp_path: Path
) -> None:
    def stop(step: int, steps: int, logged: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"epochs": 2, "checkpoint_minutes": 0}
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model, tmp_path, on_step=stop, **settings)
    first, *rest = EXAMPLES
    other = [replace(first, token_ids=[(token + 1) % 256 for token in first.token_ids]), *rest]
    with pytest.raises(StoreError):
        train(tiny_model, tmp_path, other, **settings)


def test_the_policy_is_the_trained_weights_in_its_own_dtype(tiny_model: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        train(tiny_model, tmp_path / dtype, save_dtype=dtype)
        config = json.loads((tmp_path / dtype / "policy" / "config.json").read_text())
        assert config["dtype"] == dtype
    whole = load_model(tmp_path / "float32" / "policy", "float32").state_dict()
    rounded = load_model(tmp_path / "bfloat16" / "policy", "auto").state_dict()
    before = load_model(tiny_model, "float32").state_dict()
    for name, tensor in whole.items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(stochastic_bfloat16(tensor, name), rounded[name])
        assert not torch.equal(tensor, before[name])
    assert (
        load_tokenizer(tmp_path / "float32" / "policy").chat_template
        == load_tokenizer(tiny_model).chat_template
    )


def test_tied_weights_are_trained_and_saved(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model, "float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    load_tokenizer(tiny_model).save_pretrained(tmp_path / "tied")
    train(tmp_path / "tied", tmp_path)
    trained = load_model(tmp_path / "policy", "float32")
    assert trained.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr()
    assert not torch.equal(trained.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 4, "lora_dropout": 0.3}], ids=["whole", "lora"])
def test_recomputed_activations_change_nothing(
    tiny_model: Path, tmp_path: Path, adapters: dict[str, Any]
) -> None:
    kept = train(tiny_model, tmp_path / "kept", **adapters)
    for share in (0.5, 1.0):
        again = train(tiny_model, tmp_path / str(share), activation_checkpointing=share, **adapters)
        for name in ("loss", "grad_norm"):
            assert [entry[name] for entry in again] == pytest.approx(
                [entry[name] for entry in kept], rel=reordered(4_000, condition=4)
            )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_lora_leaves_the_merged_policy_and_its_adapters(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    history = train(tiny_model, tmp_path, lora_rank=4, lora_alpha=8, lora_targets=["q_proj", "down_proj"])
    assert len(history) == 3
    merged = load_model(tmp_path / "policy", "float32")
    base = load_model(tiny_model, "float32")
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, base.state_dict()[name])
    }
    assert changed == {"q_proj", "down_proj"}
    adapted = PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter").eval()
    largest = float(logits(merged).abs().max())
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=0, atol=reordered(2_000) * largest)
    for path in (tmp_path / "policy").rglob("*.json"):
        assert str(tiny_model) not in path.read_text(), path


def test_lora_that_cannot_be_had_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"names 'query', which is no layer .* q_proj"):
        train(tiny_model, tmp_path, lora_rank=4, lora_targets=["q_proj", "query"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package peft: pip install 'qrpo\[lora\]'"):
        train(tiny_model, tmp_path, lora_rank=4)


def test_deepspeed_that_cannot_be_had_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(ConfigError, match="needs the package deepspeed"):
            train(tiny_model, tmp_path, deepspeed="zero3.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"no DeepSpeed config 'zero3.json' \[training.deepspeed\]"):
        train(tiny_model, tmp_path, deepspeed="zero3.json")
    for name, enabled in (("bf16", True), ("bf16", "auto"), ("fp16", True)):
        (tmp_path / "zero.json").write_text(json.dumps({name: {"enabled": enabled}, "train_batch_size": 4}))
        with pytest.raises(
            ConfigError, match=f"turns {name} on: DeepSpeed would round weights to the nearest"
        ):
            train(tiny_model, tmp_path, deepspeed=str(tmp_path / "zero.json"))


def test_a_first_loss_that_is_no_number_is_not_the_learning_rates() -> None:
    state = TrainerState(global_step=1)
    with pytest.raises(ObjectiveError, match="the loss is inf at step 1: scale rewards"):
        _StepReporter(None).on_log(None, state, None, {"loss": float("inf")})


def test_a_loss_that_is_no_number_ends_the_training(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(
        ObjectiveError, match=r"the loss is (nan|inf) at step [23]: lower training.learning_rate"
    ):
        train(
            tiny_model,
            tmp_path,
            epochs=9,
            warmup_ratio=0,
            learning_rate=1e30,
            on_step=lambda *step: seen.append(step[0]),
        )
    assert max(seen) < 3
    assert not (tmp_path / "policy").exists()


def test_weights_that_are_no_numbers_are_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="is not finite after training"):
        train(tiny_model, tmp_path, batch_size=10, warmup_ratio=0, learning_rate=1e39)
    assert not (tmp_path / "policy").exists()


def test_nothing_to_train_on_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no training items"):
        train(tiny_model, tmp_path, items=[])


def test_work_left_by_another_training_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, checkpoint_minutes=0)
    with pytest.raises(StoreError, match="this checkpoint is of training"):
        train(tiny_model, tmp_path, checkpoint_minutes=0, items=EXAMPLES[:9])
    with pytest.raises(StoreError, match="this checkpoint is of training"):
        train(tiny_model, tmp_path, checkpoint_minutes=0, learning_rate=2e-3)
    train(tiny_model, tmp_path, checkpoint_minutes=9, activation_checkpointing=0.5)  # changes no result


@pytest.mark.parametrize(
    "items", [EXAMPLES, [Pair(*EXAMPLES[:2]), Pair(*EXAMPLES[2:4])]], ids=["examples", "pairs"]
)
def test_a_job_is_read_as_it_was_written(items: list[Item], tmp_path: Path) -> None:
    settings = {
        "objective": ObjectiveConfig(kind="qrpo", transform="power", exponent=1 / 3, beta=1e-7),
        "training": TrainingConfig(lora_rank=3, lora_targets=("q_proj",), checkpoint_minutes=0.1),
        "run_name": "demo-qrpo-1234",
    }
    write_job(items, Path("here"), tmp_path / "out", tmp_path, **settings)  # type: ignore[arg-type]
    read, given = read_job(tmp_path)
    assert given == settings | {
        "directory": Path("here").absolute(),
        "out": tmp_path / "out",
        "work": tmp_path,
        "stored": None,
    }
    assert [plain(item) for item in read] == [plain(item) for item in items]


def plain(item: Item) -> Any:
    if isinstance(item, Pair):
        return plain(item.chosen), plain(item.rejected)
    numbers = (item.target, item.beta, item.ref_logprob, item.reward)
    return [int(token) for token in item.prompt_token_ids], [int(token) for token in item.token_ids], numbers


def test_a_job_of_both_kinds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 items are pairs"):
        write_job(
            [EXAMPLES[0], Pair(*EXAMPLES[:2])],
            tmp_path,
            tmp_path,
            tmp_path,
            objective=ObjectiveConfig(),
            training=TrainingConfig(),
        )
    with pytest.raises(DataError, match="cannot read the job"):
        read_job(tmp_path)


def test_a_job_trains_as_the_function_does(tiny_model: Path, tmp_path: Path) -> None:
    expected = train(tiny_model, tmp_path / "function")
    job(tiny_model, tmp_path)
    assert main([str(tmp_path / "job")]) == 0
    history = json.loads((tmp_path / "job" / HISTORY).read_text())
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in expected]
    weights = [tmp_path / place / "policy" / "model.safetensors" for place in ("function", "")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_a_process_meets_is_what_the_launcher_raises(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = job(tiny_model, tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main([str(folder)]) == 1
    error = _failure(folder, 1)
    assert type(error) is ModelError
    assert "cannot load the model" in str(error)
    assert capfd.readouterr().err.endswith(f"error: {error}\n")
    (folder / FAILURE).unlink()
    (folder / "train.log").write_text("one\ntwo\n")
    assert type(_failure(folder, -9)) is QRPOError
    assert "ended with status -9: one / two" in str(_failure(folder, -9))


def job(tiny_model: Path, tmp_path: Path) -> Path:
    """The job of `train`, on a copy of the model."""
    shutil.copytree(tiny_model, tmp_path / "model")
    write_job(
        EXAMPLES,
        tmp_path / "model",
        tmp_path / "policy",
        tmp_path / "job",
        objective=ObjectiveConfig(beta=0.5),
        training=TrainingConfig(precision="fp32", batch_size=4, learning_rate=1e-3),
    )
    return tmp_path / "job"
