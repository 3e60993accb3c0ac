"""A comparison as text: one spelling of each number for the terminal, the UI and the HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from qrpo_core.common.formatting import decimals_for, number, percent
from qrpo_core.evaluation.comparison_results import ComparisonResult, PairDifference, ScorerResult
from qrpo_core.evaluation.results import Estimate


def headline(result: ComparisonResult) -> str:
    """Which variant is ahead by the reward, and whether the data resolves it."""
    scored = result.scorers[0]
    if not scored.variants:
        return "No variant has a reward."
    best = scored.variants[0]
    if len(scored.variants) == 1:
        return f"{best.variant} is the only variant with a reward."
    equal = [each.variant for each in scored.variants if each.gain.value == best.gain.value]
    if len(equal) > 1:
        return f"{_listed(equal)} have the same reward, which is the highest."
    rivals = [each.variant for each in scored.variants[1:] if each.best_rank == 1]
    if best.worst_rank == 1:
        return f"{best.variant} has the highest reward, and every difference to it is resolved."
    return (
        f"{best.variant} has the highest reward; it is not resolved from {_listed(rivals)}."
        if rivals
        else f"{best.variant} has the highest reward."
    )


def method_text(result: ComparisonResult) -> str:
    """How the intervals, the ranks and the corrections came about."""
    level, seeds = f"{100 * result.confidence:g} %", len(result.seeds)
    over = (
        f"prompts and {seeds} training seeds (crossed analysis of variance, Student quantiles)"
        if seeds > 1
        else "prompts alone: with one training seed they say nothing about another training"
    )
    return (
        f"{result.prompts:,} held-out prompts, {result.samples_per_prompt} completions each, with the same "
        f"sampling seeds for every policy. Gains are over the reference policy, paired by prompt. "
        f"{level} intervals over {over}. A difference of two variants is resolved if its p-value, corrected "
        "by Holm's method for all pairs of that scorer, is below "
        f"{1 - result.confidence:.2g}; the range behind a rank is what the resolved differences leave open."
    )


def doubts(result: ComparisonResult) -> list[str]:
    """Reasons to read the comparison with care."""
    found = []
    if result.failed:
        found.append(f"{result.failed} trainings or evaluations failed: the table names them.")
    if len(result.seeds) < 3:
        few = "one training seed" if len(result.seeds) == 1 else f"{len(result.seeds)} training seeds"
        found.append(f"With {few} an interval is of little use against chance in training; 5 are better.")
    if len(result.scorers) == 1:
        found.append(
            "No held-out judge: the reward that was trained on is the only one that compares. Name others in "
            "evaluation.judges."
        )
    found += [
        f"{name} is the reward of training or a part of it, not a held-out judge."
        for name in result.training_rewards
    ]
    if not result.unbiased:
        found.append("Completions are drawn with top_p below 1: what stands under KL is a mean log-ratio.")
    found += [
        f"{each.scorer}: no score of any completion of {count} of the trained policies of {variant}."
        for each in result.scorers
        for variant, count in each.silent.items()
    ]
    found += [
        f"{each.scorer}: {each.left_out:,} prompts are left out, because some policy has no score there."
        for each in result.scorers
        if each.left_out
    ]
    return found


def comparison_rows(result: ComparisonResult) -> list[list[str]]:
    """The table of variants, best reward first and failed ones last; its first row is the head."""
    head = ["rank", "variant", "seeds"]
    head += [f"{each.scorer}, gain (rank)" for each in result.scorers]
    head += ["KL, nats", f"tokens (reference {result.tokens_before:.1f})", "cut"]
    decimals = [_decimals([each.gain for each in scored.variants]) for scored in result.scorers]
    rows = [head]
    for variant in ordered(result):
        facts = result.facts_of(variant)
        own = result.scorers[0].of(variant)
        row = ["–" if own is None else ranks(result.scorers[0], variant), variant, f"{facts.seeds}"]
        if facts.failed:
            row[2] += f" ({len(facts.failed)} failed)"
        for place, scored in enumerate(result.scorers):
            score = scored.of(variant)
            rank = "" if place == 0 or score is None else f" ({ranks(scored, variant)})"
            absent = "no score" if variant in scored.silent else "–"
            row.append(absent if score is None else interval(score.gain, decimals[place], signed=True) + rank)
        row.append("–" if facts.kl is None else interval(facts.kl, _decimals([facts.kl])))
        row.append("–" if facts.tokens is None else interval(facts.tokens, 1))
        row.append("–" if facts.cut is None else percent(facts.cut))
        rows.append(row)
    return rows


def ordered(result: ComparisonResult) -> list[str]:
    """The variants by their reward, those without one last."""
    ranked = [each.variant for each in result.scorers[0].variants]
    return ranked + [each.variant for each in result.variants if each.variant not in ranked]


def failures(result: ComparisonResult) -> list[str]:
    """One line for each training or evaluation that failed."""
    return [
        f"{facts.variant}, seed {seed}: {error}"
        for facts in result.variants
        for seed, error in facts.failed.items()
    ]


def choice_rows(result: ComparisonResult) -> list[list[str]]:
    """The table of what the validation prompts chose; empty where nothing was chosen."""
    if not result.choices:
        return []
    rows = [["group", "chosen", "mean gain of each candidate on the validation prompts"]]
    for choice in result.choices:
        gains = [
            f"{name}: {'no score' if gain is None else number(gain, 4, signed=True)}"
            for name, gain in choice.candidates.items()
        ]
        rows.append([choice.group, choice.chosen, "; ".join(gains)])
    return rows


def pair_lines(result: ComparisonResult) -> list[str]:
    """By scorer: the resolved differences, the largest first, and the pairs that are not resolved."""
    lines = []
    for scored in result.scorers:
        if not scored.pairs:
            continue
        resolved = sorted(
            (each for each in scored.pairs if each.resolved), key=lambda each: -abs(each.difference.value)
        )
        lines.append(f"{scored.scorer}: {len(resolved)} of {len(scored.pairs)} differences are resolved")
        lines += [f"  {pair_text(each)}" for each in resolved]
        open_pairs = [" and ".join(each.names) for each in scored.pairs if not each.resolved]
        if open_pairs:
            lines.append(f"  not resolved: {'; '.join(open_pairs)}")
    return lines


def pair_text(pair: PairDifference) -> str:
    """A difference of two variants, the better one first, with its interval and its corrected p-value."""
    names, value = pair.names, pair.difference
    if value.value < 0:
        names = (names[1], names[0])
        value = Estimate(-value.value, _minus(value.high), _minus(value.low))
    shown = interval(value, _decimals([value]), signed=True)
    return f"{names[0]} over {names[1]}: {shown}, {p_text(pair.p_value)}"


def p_text(value: float) -> str:
    """A p-value: p = 0.031, p < 0.0001."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def ranks(scored: ScorerResult, variant: str) -> str:
    """A variant's rank and the ranks that the resolved differences leave open: `2, 1–3`."""
    score = scored.of(variant)
    if score is None:
        return "–"
    if score.best_rank == score.worst_rank:
        return f"{score.rank}"
    return f"{score.rank}, {score.best_rank}–{score.worst_rank}"


def interval(estimate: Estimate, decimals: int, *, signed: bool = False) -> str:
    """A mean with its interval: `+0.12 [0.05, 0.19]`."""
    text = number(estimate.value, decimals, signed=signed)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{number(estimate.low, decimals)}, {number(estimate.high, decimals)}]"


def _decimals(estimates: Sequence[Estimate]) -> int:
    found = [
        decimals_for(
            each.value, None if each.low is None or each.high is None else (each.high - each.low) / 2
        )
        for each in estimates
    ]
    return min(max(found, default=3), 6)


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _listed(names: Sequence[str]) -> str:
    shown = list(names[:4]) + ([f"{len(names) - 4} others"] if len(names) > 4 else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
