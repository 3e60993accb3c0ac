"""The reward `model`: known scores whatever the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qrpo_core.common.errors import ConfigError, EngineError, ModelError
from qrpo_core.config.rewards import ModelRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.model import classifier as classifier_module
from qrpo_core.rewards.model.classifier import Classifier, load_tokenizer
from qrpo_core.rewards.model.reward import ModelReward

ARCHITECTURES = ("Llama", "GPTNeoX", "Bert")
WORDS = ("alpha", "be", "the long gamma", "?", "<|end|>", "\u00e9\u4e2d", "no")
MakeClassifier = Callable[..., Path]


def rows(count: int = 70) -> list[RewardRequest]:
    """Rows of many lengths, no two alike; in a fixed disorder."""
    made = [
        RewardRequest(
            f"p{i}", i, (("user", f"Q{i}"),), " ".join(WORDS[(i + k) % 7] for k in range(i % 23)), None
        )
        for i in range(count)
    ]
    random.Random(0).shuffle(made)
    return made


def reward(path: Path, **settings: Any) -> ModelReward:
    return ModelReward(ModelRewardConfig(path=str(path), dtype="float32", **settings))


def values(scores: list[Score]) -> list[float]:
    assert {score.status for score in scores} <= {"ok"}, scores
    return [float(score.reward) for score in scores]  # type: ignore[arg-type]


def by_hand(path: Path, request: RewardRequest, label: int = 0) -> float:
    """The score of one unpadded row, without any of the code under test: the template is spelled out here."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    bos, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|bos|>", "<|end|>"))
    ids = [bos]
    for role, content in [*request.messages, ("assistant", request.text)]:
        ids += [tokenizer.convert_tokens_to_ids(f"<|{role}|>"), *plain(content), end]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, label])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_the_unpadded_row(make_classifier: MakeClassifier, architecture: str) -> None:
    path = make_classifier(architecture)
    requests = rows(12)
    found = values(reward(path).score(requests))
    assert found == pytest.approx([by_hand(path, request) for request in requests], abs=1e-4)
    assert max(found) - min(found) > 0.1  # the rows differ by far more than the tolerance


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_do_not_depend_on_batch_order_or_padding_side(
    make_classifier: MakeClassifier, architecture: str, padding_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = rows()
    alone = {
        r.prompt_id: v
        for r, v in zip(
            requests,
            values(reward(make_classifier(architecture), batch_tokens=1).score(requests)),
            strict=True,
        )
    }
    path = make_classifier(architecture, tokenizer={"padding_side": padding_side})
    monkeypatch.setattr(classifier_module, "_CPU_TOKENS", 10**9)
    for size in (7, 64):
        made = reward(path, batch_tokens=size * 180)
        for order in (requests, requests[::-1], sorted(requests, key=lambda r: len(r.text))):
            assert values(made.score(order)) == pytest.approx([alone[r.prompt_id] for r in order], abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["Llama", "GPTNeoX", "Qwen2"])
def test_causal_heads_are_padded_on_either_side(
    make_classifier: MakeClassifier, architecture: str, side: Any
) -> None:
    made = classifier(make_classifier(architecture))
    batch = [tuple(range(3, 3 + length)) for length in (1, 4, 30, 9)]
    alone = [made.padded([row], "right")[0] for row in batch]
    for width in (30, 41):
        assert made.padded(batch, side, width).tolist() == pytest.approx(alone, abs=1e-4)


def classifier(path: Path, **settings: Any) -> Classifier:
    config = ModelRewardConfig(path=str(path), dtype="float32", **settings)
    return Classifier(path, config, load_tokenizer(path, config))


def test_a_side_that_changes_scores_is_not_used(make_classifier: MakeClassifier) -> None:
    made = classifier(make_classifier("Bert"))
    batch = {(1, 2, 3): "a", (4, 5, 6, 7, 8): "b"}
    alone = [made.padded([row], "right")[0] for row in batch]
    assert made.padded(list(batch), "left").tolist() != pytest.approx(alone, abs=1e-2)  # reads [CLS] at 0
    assert made.check(list(batch), batch) == "right"


def test_a_model_that_ignores_the_mask_is_refused(make_classifier: MakeClassifier) -> None:
    made = classifier(make_classifier("Bert"))
    forward = made._model.forward
    made._model.forward = lambda input_ids, **others: forward(input_ids=input_ids)
    with pytest.raises(EngineError, match=r"depend on padding .* right: .* instead of .* left: .*prompt"):
        made.scores({(1, 2, 3): "prompt a", (4, 5): "prompt b"}, lambda ids: None)


def test_a_left_padding_model_is_padded_on_the_left(make_classifier: MakeClassifier) -> None:
    made = classifier(make_classifier("Llama", pad=False))
    pad = made._pad
    assert pad is None
    forward = made._model.forward

    def last_column(**inputs: torch.Tensor) -> Any:
        # Reads the last column whatever stands there, as code that expects left padding does.
        made._model.config.pad_token_id = None
        parts = [
            forward(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
            for row in range(len(inputs["input_ids"]))
        ]
        return type("Output", (), {"logits": torch.cat(parts)})

    made._model.forward = last_column
    batch = {(1, 2, 3): "a", (4, 5): "b"}
    found = made.scores(batch, lambda ids: None)
    assert made.side == "left"
    assert list(found.values()) == pytest.approx([made.padded([row], "right")[0] for row in found], abs=1e-4)


def test_several_outputs_need_a_label(make_classifier: MakeClassifier) -> None:
    path = make_classifier("Llama", labels=3)
    request = rows(1)
    for label in range(3):
        found = values(reward(path, label=label).score(request))
        assert found == pytest.approx([by_hand(path, request[0], label)], abs=1e-4)
    with pytest.raises(ConfigError, match=r"3 outputs .*reward.model.label, 0 to 2"):
        reward(path).problems(())
    with pytest.raises(ConfigError, match="label 3 is not one of the model's 3"):
        reward(path, label=3).problems(())
    with pytest.raises(ConfigError, match="2 outputs"):  # config.json says nothing: transformers takes 2
        reward(make_classifier("Llama", labels=2)).problems(())


def test_too_long_is_a_status_with_both_lengths(make_classifier: MakeClassifier) -> None:
    made = reward(make_classifier("Llama"), max_length=20)
    fits = RewardRequest("p", 0, (("user", "Q"),), "a" * 14, None)  # 6 tokens around question and answer
    longer = RewardRequest("p", 1, (("user", "Q"),), "a" * 15, None)
    calls: list[int] = []
    found = made.score([longer, fits], calls.append)
    assert found[1].status == "ok"
    assert found[0] == Score(None, "too_long", "21 tokens, the reward model takes 20")
    assert sum(calls) == 2


def test_the_longest_input_is_the_smaller_of_model_and_tokenizer(make_classifier: MakeClassifier) -> None:
    assert classifier(make_classifier("Llama")).max_length == 256
    assert classifier(make_classifier("Llama", tokenizer={"model_max_length": 99})).max_length == 99
    # RoBERTa's positions begin behind its padding id.
    roberta = classifier(
        make_classifier("Roberta", tokenizer={"pad_token": "<|eos|>"}, max_position_embeddings=400)
    )
    assert roberta.max_length == 400 - roberta._pad - 1  # type: ignore[operator]
    with pytest.raises(ConfigError, match="max_length 257 is above the model's 256"):
        reward(make_classifier("Llama"), max_length=257).problems(())


def test_memory_that_runs_out_halves_batches(
    make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_classifier("Llama")
    requests = rows()
    expected = values(reward(path).score(requests))
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        shapes = limit_tokens(monkeypatch, 300, error)
        made = reward(path)
        assert values(made.score(requests)) == pytest.approx(expected, abs=1e-4)
        assert any(rows * width > 300 for rows, width in shapes)
        tried = len(shapes)
        made.score(requests)
        assert all(rows * width <= 300 for rows, width in shapes[tried:])  # it remembers


def limit_tokens(patch: pytest.MonkeyPatch, most: int, error: Exception) -> list[tuple[int, int]]:
    """Every Llama classifier raises `error` above so many tokens; the shapes it was given."""
    from transformers import LlamaForSequenceClassification

    real = LlamaForSequenceClassification.__dict__.get(
        "forward_before", LlamaForSequenceClassification.forward
    )
    patch.setattr(LlamaForSequenceClassification, "forward_before", real, raising=False)
    shapes: list[tuple[int, int]] = []

    def forward(
        self: Any, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None
    ) -> Any:
        shapes.append(tuple(input_ids.shape))  # type: ignore[arg-type]
        if input_ids.numel() > most:
            raise error
        return real(self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    patch.setattr(LlamaForSequenceClassification, "forward", forward)
    return shapes


def test_a_single_row_that_does_not_fit_is_named(
    make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_tokens(monkeypatch, 20, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(EngineError, match=r"does not fit .*\[prompt long, sample 7\]"):
        reward(make_classifier("Llama")).score([RewardRequest("long", 7, (("user", "Q"),), "a" * 30, None)])


def test_other_errors_are_not_taken_for_memory(
    make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_tokens(monkeypatch, 0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        reward(make_classifier("Llama")).score(rows(2))


def test_a_nan_score_is_a_parse_error(
    make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Classifier.padded

    def broken(self: Classifier, batch: Any, side: Any, width: Any = None) -> Any:
        found = real(self, batch, side, width)
        found[[len(row) > 30 for row in batch]] = float("nan")
        return found

    monkeypatch.setattr(Classifier, "padded", broken)
    statuses = {score.status for score in reward(make_classifier("Llama")).score(rows())}
    assert statuses == {"ok", "parse_error"}


@pytest.mark.parametrize("pad", [None, "<|end|>", "<|bos|>"])
def test_a_model_without_padding_reads_the_last_token(
    make_classifier: MakeClassifier, pad: str | None
) -> None:
    # Every row ends with <|end|>: as padding it would move the reading to the token before.
    path = make_classifier("GPTNeoX", pad=False, tokenizer={"pad_token": pad})
    requests = rows(9)
    found = values(reward(path).score(requests))
    assert found == pytest.approx([by_hand(path, request) for request in requests], abs=1e-4)


def test_no_token_that_can_be_padding(make_classifier: MakeClassifier) -> None:
    made = classifier(make_classifier("GPTNeoX", pad=False))
    special = made._tokenizer.all_special_ids
    with pytest.raises(ModelError, match="no token can serve as padding"):
        made.scores({(1, token): f"row {token}" for token in special}, lambda ids: None)
    made.scores({(1, 2): "row"}, lambda ids: None)
    with pytest.raises(EngineError, match="serves as padding"):
        made.scores({(1, made._pad): "row"}, lambda ids: None)  # type: ignore[dict-item]


def test_equal_rows_are_scored_once(make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = limit_tokens(monkeypatch, 10**9, MemoryError())
    made = reward(make_classifier("Llama"))
    made.score(rows(2))
    before = len(shapes)
    calls: list[int] = []
    found = made.score([rows(2)[0]] * 5, calls.append)
    assert [rows for rows, _ in shapes[before:]] == [1]
    assert len(set(found)) == 1
    assert calls == [5]


def test_closed_it_loads_again(make_classifier: MakeClassifier) -> None:
    made = reward(make_classifier("Llama"))
    made.close()
    found = made.score(rows(3))
    made.close()
    assert made._loaded is None
    assert made.score(rows(3)) == found


def test_bfloat16_scores_are_no_coarser_than_float32(
    make_classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bfloat16 also where that is slow, and would be float32.
    monkeypatch.setattr(classifier_module, "compute_dtype", lambda dtype, device: getattr(torch, dtype))
    path = make_classifier("Llama")
    requests = rows()
    half = ModelReward(ModelRewardConfig(path=str(path), dtype="bfloat16"))
    found = values(half.score(requests))
    assert found == pytest.approx(values(reward(path).score(requests)), abs=0.2)
    rounded = torch.tensor(found).bfloat16().float().tolist()
    assert found != pytest.approx(rounded, abs=1e-6)  # not on bfloat16's grid
