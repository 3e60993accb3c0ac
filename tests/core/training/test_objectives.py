"""Each objective through the trainer's compute_loss: losses and gradients against numbers worked out by hand.

The policy is a head on given hidden states, so that each row's log-prob is a number that is set here.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qrpo_core.common.errors import DataError
from qrpo_core.config import ObjectiveConfig
from qrpo_core.data.collator import Collator, Example, Item, Pair
from qrpo_core.objective_kinds import make_objective
from qrpo_core.training.metrics import MetricSums, item_metrics
from qrpo_core.training.trainer import QRPOTrainer

HALF = math.log(0.5)


class TableModel(nn.Module):
    """A causal model over two tokens: logits are [s, 0], with s looked up by the token before.

    So log pi(1 | token t) = -log(1 + exp(s_t)), and its derivative in s_t is -sigmoid(s_t).
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 1)
        nn.init.zeros_(self.table.weight)
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0], [0.0]])
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(), use_cache=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.table(input_ids))}


def row(token: int, tokens: int = 1, **known: float) -> Example:
    """A completion of `tokens` ones after the prompt [token]; its log-prob is log 0.5 for every token."""
    return Example([token], [1] * tokens, **known)


def loss_and_gradient(
    config: ObjectiveConfig, items: list[Item], tmp_path: Path
) -> tuple[float, list[float], dict[str, float]]:
    """Mean loss, its gradient in s of tokens 2, 3, ..., and what is measured beside it."""
    from transformers import TrainingArguments

    model = TableModel()
    trainer = QRPOTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True), items, objective=config)
    inputs = Collator()(trainer.train_dataset)  # type: ignore[arg-type]
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    means = trainer._metrics.take({"loss": loss.detach()}, lambda own: own).read()
    return loss.item(), model.table.weight.grad[2:, 0].tolist(), means  # type: ignore[union-attr]


# d log pi(1 | token) / ds = -1/2 at s = 0, so the gradient in s_t is -1/2 of that in the row's log-prob.


def test_qrpo_squared(tmp_path: Path) -> None:
    """Log-ratios log 0.5 - log 0.25 = log 2 and 0.1; residuals 0.6 - 0.5 log 2 and -0.2 - 2 * 0.1 = -0.4."""
    items = [
        row(2, target=0.6, beta=0.5, ref_logprob=2 * HALF),
        row(3, target=-0.2, beta=2.0, ref_logprob=HALF - 0.1),
    ]
    first, second = 0.6 - 0.5 * math.log(2), -0.4
    loss, gradient, logged = loss_and_gradient(ObjectiveConfig(), items, tmp_path)
    assert loss == pytest.approx((first**2 + second**2) / 2)
    # d/dlogpi = -2 beta residual, over two examples
    assert gradient[:2] == pytest.approx([-0.5 * -2 * 0.5 * first / 2, -0.5 * -2 * 2.0 * second / 2])
    assert logged["log_ratio"] == pytest.approx((math.log(2) + 0.1) / 2)
    assert logged["implicit_reward"] == pytest.approx((0.5 * math.log(2) + 0.2) / 2)
    assert logged["target"] == pytest.approx(0.2)
    assert logged["log_ratio_target"] == pytest.approx((1.2 - 0.1) / 2)
    assert logged["log_ratio_error"] == pytest.approx((1.2 - math.log(2) + 0.2) / 2)
    assert logged["kl"] == pytest.approx((2 - 1 - math.log(2) + math.exp(0.1) - 1.1) / 2)
    assert logged["positive_targets"] == logged["sign_agreement"] == 0.5


def test_qrpo_absolute_by_length(tmp_path: Path) -> None:
    """One row of two tokens: |0.6 - 0.5 (2 log 0.5 - log 0.5)| / 2 = (0.6 + 0.5 log 2)/2."""
    items = [row(2, tokens=2, target=0.6, beta=0.5, ref_logprob=HALF)]
    config = ObjectiveConfig(loss="mae", loss_scale="by_length")
    loss, gradient, logged = loss_and_gradient(config, items, tmp_path)
    assert loss == pytest.approx((0.6 + 0.5 * math.log(2)) / 2)
    assert gradient[0] == pytest.approx(-0.5 * -0.5 / 2)
    assert logged["log_ratio_per_token"] == pytest.approx(HALF / 2)
    assert logged["completion_tokens"] == 2


@pytest.mark.parametrize("kind", ["a_star", "best_of_n"])
def test_the_kin_of_qrpo_have_its_loss(kind: Any, tmp_path: Path) -> None:
    items = [row(2, target=0.6, beta=0.5, ref_logprob=2 * HALF)]
    expected = loss_and_gradient(ObjectiveConfig(), items, tmp_path)
    found = loss_and_gradient(ObjectiveConfig(kind=kind), items, tmp_path)
    assert found[:2] == expected[:2]
    assert found[2]["log_ratio_error"] == expected[2]["log_ratio_error"]


def test_tup(tmp_path: Path) -> None:
    """beta 1/2, log Z = 2 log 2, log-ratios log 2 and 0; labels 0.4 and 0.

    Targets are the label's log odds less beta log Z, and -inf. Log odds of the predictions: 1.5 log 2, log 2.
    """
    shared = {"beta": 0.5, "log_partition": 2 * math.log(2)}
    items = [
        row(2, target=math.log(0.4 / 0.6) - math.log(2), ref_logprob=2 * HALF, **shared),
        row(3, target=-math.inf, ref_logprob=HALF, **shared),
    ]
    first, second = 2**1.5 / (1 + 2**1.5), 2 / 3
    loss, gradient, logged = loss_and_gradient(ObjectiveConfig(kind="tup"), items, tmp_path)
    by_hand = -0.4 * math.log(first) - 0.6 * math.log(1 - first), -math.log(1 - second)
    assert loss == pytest.approx(sum(by_hand) / 2)
    # d/dlogpi = beta (prediction - label), over two examples
    assert gradient[:2] == pytest.approx([-0.5 * 0.5 * (first - 0.4) / 2, -0.5 * 0.5 * second / 2])
    assert logged["label"] == pytest.approx(0.2)
    assert logged["prediction"] == pytest.approx((first + second) / 2)
    assert logged["label_error"] == pytest.approx((first - 0.4 + second) / 2)
    assert logged["truncated"] == 0.5
    # The mean over the one target that is finite.
    wanted = 2 * math.log(0.4 / 0.6) - 2 * math.log(2)
    assert logged["log_ratio_target"] == pytest.approx(wanted)
    assert logged["log_ratio_error"] == pytest.approx(math.log(2) - wanted)
    assert logged["positive_targets"] == 0
    assert "finite" not in logged
    alone = loss_and_gradient(ObjectiveConfig(kind="tup"), items[1:], tmp_path)[2]
    assert "log_ratio_target" not in alone


PAIR = Pair(row(2, tokens=2, ref_logprob=3 * HALF, reward=1.5), row(3, ref_logprob=HALF, reward=0.5))


def test_dpo(tmp_path: Path) -> None:
    """D_w - D_l = (2 - 3) log 0.5 - 0 = log 2; beta 0.3: -log sigmoid(0.3 log 2)."""
    z = 0.3 * math.log(2)
    slope = -0.3 / (1 + math.exp(z))  # d/dD_w of -log sigmoid(beta D)
    loss, gradient, logged = loss_and_gradient(ObjectiveConfig(kind="dpo", beta=0.3), [PAIR], tmp_path)
    assert loss == pytest.approx(math.log1p(math.exp(-z)))
    assert gradient[:2] == pytest.approx([-0.5 * slope, 0.5 * slope])
    assert logged["accuracy"] == 1
    assert logged["margin"] == pytest.approx(math.log(2))
    assert logged["log_ratio"] == pytest.approx(math.log(2) / 2)
    assert logged["implicit_reward"] == pytest.approx(0.3 * math.log(2) / 2)


def test_simpo(tmp_path: Path) -> None:
    """Mean log-probs are equal: -log sigmoid(-gamma), gamma = 2 * 0.25."""
    config = ObjectiveConfig(kind="simpo", beta=2.0, gamma_beta_ratio=0.25)
    loss, gradient, logged = loss_and_gradient(config, [PAIR], tmp_path)
    assert loss == pytest.approx(math.log1p(math.exp(0.5)))
    slope = -2.0 / (1 + math.exp(-0.5))
    # s_2 is behind one of the chosen row's two tokens, the other is behind token 1
    assert gradient[:2] == pytest.approx([-0.5 * slope / 2, 0.5 * slope])
    assert logged["margin"] == logged["accuracy"] == 0


def test_rebel(tmp_path: Path) -> None:
    """( (1.5 - 0.5)/2 - log 2 )^2."""
    loss, gradient, _ = loss_and_gradient(ObjectiveConfig(kind="rebel", beta=2.0), [PAIR], tmp_path)
    residual = 0.5 - math.log(2)
    assert loss == pytest.approx(residual**2)
    assert gradient[:2] == pytest.approx([-0.5 * -2 * residual, 0.5 * -2 * residual])


@pytest.mark.parametrize(("kind", "beta"), [("dpo", 0.3), ("simpo", 2.0), ("rebel", 2.0)])
def test_the_rows_of_a_pair_are_neighbours(kind: Any, beta: float, tmp_path: Path) -> None:
    """The loss of several pairs is the mean of their own."""
    config, items = ObjectiveConfig(kind=kind, beta=beta), [PAIR, Pair(PAIR.rejected, PAIR.chosen), PAIR]
    alone = [loss_and_gradient(config, [item], tmp_path)[0] for item in items]
    assert loss_and_gradient(config, items, tmp_path)[0] == pytest.approx(sum(alone) / 3)


@pytest.mark.parametrize("items", [[row(2, tokens=3), row(4)], [Pair(row(2, tokens=3), row(3)), PAIR]])
def test_sft_trains_on_examples_or_on_the_chosen(items: list[Item], tmp_path: Path) -> None:
    loss, gradient, _ = loss_and_gradient(ObjectiveConfig(kind="sft"), items, tmp_path)
    second = 1 if isinstance(items[1], Example) else 2
    assert loss == pytest.approx(-HALF * (3 + second) / 2)
    assert gradient[1] == 0, "token 3 begins a rejected completion"
    config = ObjectiveConfig(kind="sft", loss_scale="by_length")
    assert loss_and_gradient(config, items, tmp_path)[0] == pytest.approx(-HALF)


def test_a_share_of_a_step_is_divided_by_the_items_of_the_whole_step(tmp_path: Path) -> None:
    """One real item and one filler of a step of 8 items over 4 processes, whose gradients are averaged."""
    from transformers import TrainingArguments

    model, item = TableModel(), row(2, target=0.5, ref_logprob=HALF)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    trainer = QRPOTrainer(model, arguments, [item], objective=ObjectiveConfig())
    trainer.accelerator = SimpleNamespace(num_processes=4)
    inputs = Collator()([item, row(3, target=7.0, ref_logprob=HALF)])
    inputs |= {"weight": torch.tensor([1.0, 0.0]), "items_in_step": torch.tensor(8.0)}
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(0.5**2 * 4 / 8)
    assert model.table.weight.grad[3, 0] == 0  # type: ignore[index]


def test_an_item_of_weight_0_counts_nowhere() -> None:
    objective = make_objective(ObjectiveConfig())
    sums = MetricSums()
    sums.start()
    real = [row(2, target=0.5, ref_logprob=-1.0), row(2, target=0.5, ref_logprob=-1.0)]
    for items, weight, found in ((real, 1.0, -1.5), ([row(3, target=9.0, ref_logprob=-2.0)], 0.0, math.inf)):
        batch = Collator()(items)
        batch["weight"] *= weight
        policy = torch.full((len(items),), found, dtype=torch.float64)  # a filler's are never looked at
        sums.add(item_metrics(objective, policy, batch, with_reference=True), batch)
    means = sums.take({"loss": torch.tensor(3.0)}, lambda own: own).read()
    assert means["loss"] == 3
    assert means["target"] == 0.5
    assert means["log_ratio"] == -0.5
    assert means["shared_prefix_share"] == pytest.approx(1 / 4), "two tokens each, of which they share one"


def test_sums_of_several_processes_are_one_mean() -> None:
    objective = make_objective(ObjectiveConfig())
    sums = MetricSums()
    sums.start()
    batch = Collator()([row(2, target=0.5, ref_logprob=-1.0)])
    sums.add(item_metrics(objective, torch.tensor([-1.5]), batch, with_reference=True), batch)

    def gather(own: torch.Tensor) -> torch.Tensor:
        other = own.clone()
        other[0] *= 2  # a slower process
        other[2] *= 5
        seen.append(own)
        return torch.cat([own, other])

    seen: list[torch.Tensor] = []
    means = sums.take({"loss": torch.tensor(3.0)}, gather).read()
    assert means["target"] == 0.5
    assert means["loss"] == (3 + 15) / 2
    assert means["tokens_per_second"] == pytest.approx(4 / (2 * float(seen[0][0])))


class TestRefused:
    @pytest.mark.parametrize("kind", ["dpo", "simpo", "rebel"])
    def test_examples_for_a_pairwise_objective(self, kind: Any, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"{kind}.*takes items of type Pair, not Example \[item 0\]"):
            loss_and_gradient(ObjectiveConfig(kind=kind), [row(2)], tmp_path)

    def test_pairs_for_qrpo_and_a_mixture(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"not Pair \[item 1\]"):
            loss_and_gradient(ObjectiveConfig(), [row(2), PAIR], tmp_path)
        with pytest.raises(DataError, match="items of types Example and Pair"):
            loss_and_gradient(ObjectiveConfig(kind="sft"), [row(2), PAIR], tmp_path)
        with pytest.raises(DataError, match="a batch of Example and Pair"):
            Collator()([row(2), PAIR])
        with pytest.raises(DataError, match="a batch of nothing"):
            Collator()([])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (Example([], [1]), "prompt_token_ids is empty"),
            (Example([2], []), "token_ids is empty"),
            (row(2, target=math.nan), "target is nan"),
            (row(2, target=-math.inf), "target is -inf"),
            (row(2, log_partition=math.inf), "log_partition is inf"),
            (row(2, ref_logprob=-math.inf), "ref_logprob is -inf"),
            (row(2, beta=0.0), "beta is 0"),
        ],
    )
    def test_rows_that_cannot_be_trained_on(self, wrong: Example, message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=rf"{message}.*item 1"):
            loss_and_gradient(ObjectiveConfig(), [row(2, ref_logprob=-1.0), wrong], tmp_path)

    def test_no_items_and_no_reference(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no training items"):
            loss_and_gradient(ObjectiveConfig(), [], tmp_path)
        with pytest.raises(DataError, match="every ref_logprob is 0, and objective 'qrpo'"):
            loss_and_gradient(ObjectiveConfig(), [row(2)], tmp_path)
        tup = ObjectiveConfig(kind="tup")
        with pytest.raises(DataError, match="every log_partition is 0, and objective 'tup'"):
            loss_and_gradient(tup, [row(2, ref_logprob=-1.0, target=-0.3)], tmp_path)
