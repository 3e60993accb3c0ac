"""Paired comparison of the trained policy with the reference model on held-out prompts.

The unit of analysis is the prompt. Completions of one prompt are not independent of each other, so every
interval resamples prompts, and every standard error is clustered by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import DataError
from qrpo_core.common.schemas import STATUSES, check_table
from qrpo_core.config import EvaluationConfig
from qrpo_core.evaluation.inputs import EVALUATED, EvaluationInput, Floats, RewardedPair, floats, strings
from qrpo_core.evaluation.results import Estimate, EvaluationResult, JudgeResult, KLEstimate, SideSummary

#: Numbers in one batch of resampled prompts: it bounds memory (80 MB) and changes no result.
_BATCH = 10_000_000

#: The name of the arithmetic of both log-probs of a KL estimate, whatever training uses; `of_kl` asks for it.
KL_ARITHMETIC = "float32"


@dataclass(frozen=True)
class PromptMeans:
    """Per-prompt mean rewards over ok completions, in the order of prompt_id.

    prompt_ids : the prompts compared, P of them.
    before, after : mean rewards, float64 of shape (P,).
    win : share of (after, before) pairs of a prompt with after > before, ties one half, shape (P,).
    tie : share of those pairs with equal rewards, shape (P,).
    left_out : how many prompts have no ok reward, by side: "before", "after", "both".
    """

    prompt_ids: tuple[str, ...]
    before: Floats
    after: Floats
    win: Floats
    tie: Floats
    left_out: dict[str, int]

    @property
    def difference(self) -> Floats:
        """after - before; exactly 0 where the means agree to twelve digits (sums round differently)."""
        same = np.isclose(self.after, self.before, rtol=1e-12, atol=0)
        return np.where(same, 0.0, self.after - self.before)


def evaluate_policies(
    data: EvaluationInput,
    config: EvaluationConfig,
    judged: Mapping[str, tuple[pa.Table, pa.Table]] = MappingProxyType({}),
) -> EvaluationResult:
    """The comparison of the trained policy with the reference model, prompt by prompt.

    judged : `before` and `after` with the rewards of each judge, by its name (schema EVALUATED).

    Intervals are percentile bootstrap intervals at `config.confidence` over prompts; one seeded set of
    resampled prompts serves all of them, so the same rows in any order give the same numbers. Below some
    twenty prompts such intervals are narrower than their level says.

    Raises DataError when no prompt has an ok reward on both sides.
    """
    means = prompt_means(data)
    difference = means.difference
    estimates = bootstrap(np.stack([means.before, means.after, difference, means.win]), config)
    samples = np.unique(strings(data.before, "prompt_id"), return_counts=True)[1]
    said = {name: _judge(data, config, name, *sides) for name, sides in judged.items()}
    return EvaluationResult(
        prompts=len(means.prompt_ids),
        left_out=means.left_out,
        samples_min=int(samples.min()),
        samples_max=int(samples.max()),
        confidence=config.confidence,
        resamples=config.resamples,
        before=side_summary(data.before, estimates[0]),
        after=side_summary(data.after, estimates[1]),
        difference=estimates[2],
        improved=int((difference > 0).sum()),
        unchanged=int((difference == 0).sum()),
        worsened=int((difference < 0).sum()),
        win_rate=estimates[3],
        tie_share=float(means.tie.mean()),
        kl=_kl(data),
        judges={name: each for name, each in said.items() if isinstance(each, JudgeResult)},
        silent_judges={name: each for name, each in said.items() if not isinstance(each, JudgeResult)},
    )


def _judge(
    data: EvaluationInput, config: EvaluationConfig, name: str, before: pa.Table, after: pa.Table
) -> JudgeResult | dict[str, int]:
    """The comparison by another reward of the same completions; raises DataError for other completions.

    Where no prompt has a score on both sides, the rows of `after` by status: what the policy's other numbers
    cost to compute is not lost.
    """
    sides = []
    for side, judged in ((data.before, before), (data.after, after)):
        judged = check_table(judged, EVALUATED, f"evaluation, judge {name}")
        judged = judged.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])
        keys = ["prompt_id", "sample_index"]
        if not judged.select(keys).equals(side.select(keys)):
            raise DataError("it scored other completions", where=f"evaluation, judge {name}")
        for column in ("reward", "status"):
            side = side.set_column(side.column_names.index(column), column, judged[column])
        sides.append(side)
    compared = EvaluationInput(sides[0], sides[1], data.temperature, data.top_p)
    try:
        means = prompt_means(compared)
    except DataError:
        return _not_ok(compared.after)
    estimates = bootstrap(np.stack([means.before, means.after, means.difference, means.win]), config)
    return JudgeResult(
        prompts=len(means.prompt_ids),
        left_out=means.left_out,
        before=estimates[0],
        after=estimates[1],
        difference=estimates[2],
        win_rate=estimates[3],
        tie_share=float(means.tie.mean()),
        not_ok_before=_not_ok(compared.before),
        not_ok_after=_not_ok(compared.after),
    )


def prompt_means(data: EvaluationInput | RewardedPair) -> PromptMeans:
    """Mean rewards, win and tie shares of every prompt that has an ok reward on both sides.

    Raises DataError when there is none.
    """
    before, after = _ok_rewards(data.before), _ok_rewards(data.after)
    everyone = sorted(set(strings(data.before, "prompt_id").tolist()))
    compared = [prompt for prompt in everyone if prompt in before and prompt in after]
    if not compared:
        raise DataError(
            f"none of {len(everyone)} held-out prompts has an ok reward on both sides",
            where="evaluation",
            remedy="see the status and detail columns of the rewards",
        )
    left_out = {
        "before": sum(prompt not in before and prompt in after for prompt in everyone),
        "after": sum(prompt in before and prompt not in after for prompt in everyone),
        "both": sum(prompt not in before and prompt not in after for prompt in everyone),
    }
    signs = [np.sign(after[prompt][:, None] - before[prompt][None, :]) for prompt in compared]
    return PromptMeans(
        prompt_ids=tuple(compared),
        before=np.array([before[prompt].mean() for prompt in compared]),
        after=np.array([after[prompt].mean() for prompt in compared]),
        win=np.array([(1 + sign.mean()) / 2 for sign in signs]),
        tie=np.array([(sign == 0).mean() for sign in signs]),
        left_out=left_out,
    )


def bootstrap(rows: Floats, config: EvaluationConfig) -> list[Estimate]:
    """The means of (k, P) numbers over P prompts, each with its percentile interval."""
    values = rows.mean(axis=-1)
    if rows.shape[-1] < 2:
        return [Estimate(float(value), None, None) for value in values]
    from scipy.stats import bootstrap

    interval = bootstrap(
        (rows,),
        np.mean,
        n_resamples=config.resamples,
        batch=max(1, _BATCH // rows.size),
        vectorized=True,
        axis=-1,
        confidence_level=config.confidence,
        method="percentile",
        rng=np.random.default_rng(config.seed),
    ).confidence_interval
    ends = zip(values, interval.low, interval.high, strict=True)
    return [Estimate(float(value), float(low), float(high)) for value, low, high in ends]


def side_summary(table: pa.Table, reward: Estimate) -> SideSummary:
    """The summary of one policy's EVALUATED rows. reward : the estimate of its mean reward."""
    lengths = floats(table, "num_tokens")
    return SideSummary(
        reward=reward,
        completions=table.num_rows,
        mean_length=float(lengths.mean()),
        median_length=float(np.median(lengths)),
        truncation_rate=float((strings(table, "finish_reason") == "length").mean()),
        not_ok=_not_ok(table),
    )


def _not_ok(table: pa.Table) -> dict[str, int]:
    status = strings(table, "status")
    return {name: int((status == name).sum()) for name in STATUSES if name != "ok"}


def _kl(data: EvaluationInput) -> KLEstimate:
    """KL(pi || pi_ref) from samples of pi: completions without a reward count too."""
    ratio = floats(data.after, "policy_logprob") - floats(data.after, "ref_logprob")
    tokens = floats(data.after, "num_tokens")
    _, prompt = np.unique(strings(data.after, "prompt_id"), return_inverse=True)
    if tokens.sum() == 0:
        raise DataError(
            "every completion of the trained policy is empty", where="evaluation, after", remedy="look at it"
        )
    value, error = _clustered_ratio(ratio, np.ones_like(ratio), prompt)
    per_token, per_token_error = _clustered_ratio(ratio, tokens, prompt)
    unbiased = data.top_p == 1
    note = (
        "Mean of log pi(y|x) - log pi_ref(y|x) over completions y drawn from the trained policy pi, both "
        f"scored in {KL_ARITHMETIC} arithmetic"
    )
    if data.temperature != 1:
        note += (
            f", both policies softmax(logits / {data.temperature:g}), as they are sampled at temperature "
            f"{data.temperature:g}"
        )
    if unbiased:
        note += (
            ": an unbiased estimate of KL(pi || pi_ref). Positive when the policy has moved away from the "
            "reference; noise alone can make it negative. A cut completion counts up to the limit."
        )
    else:
        note += (
            f". They were drawn at top_p {data.top_p:g}: because that is not 1, it is not an estimate of "
            "KL(pi || pi_ref), only the mean log-ratio of what was drawn."
        )
    return KLEstimate(
        value, error, per_token, per_token_error, unbiased, KL_ARITHMETIC, data.temperature, note
    )


def _clustered_ratio(
    top: Floats, bottom: Floats, cluster: npt.NDArray[np.intp]
) -> tuple[float, float | None]:
    """sum(top) / sum(bottom) and its standard error by linearisation, residuals summed within clusters.

    With bottom = 1 this is a mean with the usual cluster-robust error, factor G / (G - 1).
    """
    value = top.sum() / bottom.sum()
    residual = np.bincount(cluster, weights=top - value * bottom)
    clusters = residual.size
    if clusters < 2:
        return float(value), None
    variance = clusters / (clusters - 1) * np.square(residual).sum() / bottom.sum() ** 2
    return float(value), float(np.sqrt(variance))


def _ok_rewards(table: pa.Table) -> dict[str, Floats]:
    """The ok rewards of each prompt that has any."""
    ok = table.filter(pc.equal(table["status"], "ok"))
    prompts, rewards = strings(ok, "prompt_id"), floats(ok, "reward")
    names, starts = np.unique(prompts, return_index=True)
    return dict(zip(names.tolist(), np.split(rewards, starts[1:]), strict=True)) if names.size else {}
