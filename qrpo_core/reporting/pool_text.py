"""The pool report in words and rows, for terminal, UI and page."""

from __future__ import annotations

from collections.abc import Callable

from qrpo_core.common.formatting import number, percent
from qrpo_core.evaluation.judge_agreement import JudgeAgreement
from qrpo_core.evaluation.pool_report import JudgedPool, PoolReport, SignFacts
from qrpo_core.evaluation.results import Estimate
from qrpo_core.reporting.headlines import Headline, sort_headlines
from qrpo_core.reporting.text_table import table

#: From this rank correlation on, a reward is said to follow length.
_FOLLOWS_LENGTH = 0.3


def headline(report: PoolReport) -> str:
    """One sentence: what the judge that agrees least says; without a judge, what the rewards say."""
    judged = {name: each.agreement for name, each in report.judges.items() if each.agreement is not None}
    if judged:
        name = min(judged, key=lambda each: (judged[each].follows, judged[each].stops_rising.value))
        return judge_sentence(name, judged[name])
    spread, length = report.spread, report.length.rank_correlation
    free = f"{spread.signal_free_prompts:,} of {spread.prompts:,} prompts have no signal"
    return f"No judge has scored the pool. {free}; {length_words(length)}."


def judge_sentence(name: str, found: JudgeAgreement) -> str:
    """How far up a judge agrees with the reward."""
    pairs = f"on {percent(found.agreement.value)} of pairs {interval(found.agreement, shares=True)}".rstrip()
    if not found.follows:
        verb = "contradicts" if found.contradicts else "does not follow"
        return f"Judge {name} {verb} the reward: it agrees {pairs}, and chance is 50 %."
    place = f"quantile {found.stops_rising.value:.2f} {interval(found.stops_rising)}".rstrip()
    if found.parts:
        return f"Judge {name} agrees with the reward {pairs}, and stops following it at {place}."
    if found.stops_rising.value < 1:
        unseen = f"above {place} this sample shows no rise, and rules none out"
        return f"Judge {name} agrees with the reward {pairs}; {unseen}."
    least = found.stops_rising.low
    sure = "" if least is None or least >= 1 else f" (at least to quantile {least:.2f})"
    return f"Judge {name} agrees with the reward {pairs}, up to the top{sure}."


def length_words(found: Estimate | None) -> str:
    """The rank correlation of the reward with length."""
    if found is None:
        return "the reward or the length is constant within prompts"
    return f"the reward's rank correlation with length is {_plain(found)}"


def interval(found: Estimate, *, shares: bool = False) -> str:
    """[low, high] with two decimals, or in per cent; "" without an interval."""
    if found.low is None or found.high is None:
        return ""
    low, high = ((100 * end, 1) if shares else (end, 2) for end in (found.low, found.high))
    return f"[{number(*low)}, {number(*high)}]"


def headlines(report: PoolReport) -> list[Headline]:
    """What to know before training, warnings first."""
    found = [line for name, judged in report.judges.items() for line in _of_judge(report, name, judged)]
    length = report.length.rank_correlation
    if length is not None and abs(length.value) >= _FOLLOWS_LENGTH:
        way = "longer" if length.value > 0 else "shorter"
        found.append(
            Headline(
                "warning",
                f"The reward pays {way} completions: {length_words(length)}. Look at lengths after training, "
                "or take a reward that length does not move.",
            )
        )
    spread = report.spread
    if 2 * spread.signal_free_prompts > spread.prompts:
        found.append(
            Headline(
                "note",
                f"On {spread.signal_free_prompts:,} of {spread.prompts:,} prompts all rewards are equal: "
                f"they teach nothing. {report.more.additional} further references of each are expected to "
                f"change that on {report.more.useful:,.0f}.",
            )
        )
    if not report.judges:
        found.append(
            Headline("note", "Name a second reward in evaluation.judges to see how far up this one holds.")
        )
    return sort_headlines(found)


def _of_judge(report: PoolReport, name: str, judged: JudgedPool) -> list[Headline]:
    agreement = judged.agreement
    if agreement is None:
        failed = ", ".join(f"{status} {count:,}" for status, count in judged.statuses.items())
        why = f" ({failed})" if failed else ""
        return [Headline("warning", f"Judge {name} has scored no pair with unequal rewards{why}.")]
    if not agreement.follows:
        what = "prefers the opposite of what" if agreement.contradicts else "sees no difference where"
        return [
            Headline(
                "warning", f"Judge {name} {what} the reward does: one of the two measures something else."
            )
        ]
    found = []
    if (beyond := agreement.beyond_length) is not None and (beyond.low or 0.0) <= 0 < (beyond.high or 0.0):
        found.append(
            Headline(
                "warning",
                f"At equal length, judge {name} does not agree with the reward (rank correlation "
                f"{beyond.value:.2f} {interval(beyond)}): length is what they share.",
            )
        )
    if judged.truncation is not None:
        caution = _caution(report, name, judged, agreement)
        found.append(Headline("warning" if agreement.parts else "note", caution))
    return found


def _caution(report: PoolReport, name: str, judged: JudgedPool, found: JudgeAgreement) -> str:
    """What a place below the top means for beta and for TUP."""
    place = f"{found.stops_rising.value:.2f} {interval(found.stops_rising)}".rstrip()
    text = f"Above quantile {place} judge {name} does not confirm the reward."
    if not found.parts:
        text = (
            f"Whether judge {name} confirms the reward above quantile {place} is open; a larger "
            "pool_report.prompts would tell. If it does not:"
        )
    if judged.above is not None and report.beta is not None:
        spent = f"{number(judged.above.spent, 2)} of {number(judged.above.kl, 2)} nats of KL"
        text += f" At beta {report.beta:g} the optimum spends {spent} on differences there"
        least = judged.least_beta
        text += "." if least is None else f"; from beta {least:.2g} on it spends less than half."
    return f"{text} For TUP this suggests lambda {judged.truncation:.2f} (objective.truncation)."


def reward_rows(report: PoolReport) -> list[tuple[str, str]]:
    """Labels and values of the rewards and of their lengths."""
    spread, length = report.spread, report.length
    ends = f"{percent(spread.floor)}, {percent(spread.ceiling)}"
    logs = "none" if length.correlation is None else f"{length.correlation:+.2f}"
    common = ", ".join(f"{value:g} ({percent(share)})" for value, share in spread.common)
    size = f"{spread.fewest}" if spread.fewest == spread.most else f"{spread.fewest} to {spread.most}"
    failed = ", ".join(f"{status} {count:,}" for status, count in report.statuses.items())
    return [
        ("Reward", report.reward),
        ("Prompts, scored references", f"{spread.prompts:,}, {spread.references:,}"),
        ("References a prompt", size),
        ("References without a reward", failed or "none"),
        ("Different rewards, the commonest", f"{spread.distinct:,}: {common}"),
        ("References that tie with another", percent(spread.tie_rate)),
        ("Share of a prompt's commonest reward, mean", percent(spread.largest_atom)),
        ("Prompts without signal (all rewards equal)", f"{spread.signal_free_prompts:,}"),
        ("References tied at their prompt's worst, best", ends),
        ("Cut by the length limit", f"{length.cut:,} of {length.completions:,}" + _cut_quantile(report)),
        ("Mean length", f"{number(length.mean, 1)} tokens"),
        ("Correlation of reward with log length", logs),
        ("The same of ranks", _plain(length.rank_correlation)),
    ]


def _cut_quantile(report: PoolReport) -> str:
    found = report.length.cut_quantile
    return "" if found is None else f", mean quantile {found:.2f}"


def more_rows(report: PoolReport) -> list[tuple[str, str, str]]:
    """The head and rows of what further references change: what, now, then."""
    more, free = report.more, report.spread.signal_free_prompts
    rows = [("expected", "now", f"with {more.additional} more a prompt")]
    rows.append(("Standard error of a quantile, mean", f"{more.error:.3f}", f"{more.error_then:.3f}"))
    if more.signs is not None and more.signs_then is not None:
        now, then = more.signs, more.signs_then
        rows.append(("Targets with the right sign", percent(now.right), percent(then.right)))
        rows.append(("Positive targets with the right sign", _right_above(now), _right_above(then)))
    rows.append(("Prompts without signal", f"{free:,}", f"{free - more.useful:,.1f}"))
    return rows


def _right_above(signs: SignFacts) -> str:
    return "none is positive" if signs.right_above is None else percent(signs.right_above)


def judge_rows(report: PoolReport) -> list[tuple[str, ...]]:
    """A column for each judge; the first row is the head."""
    judges = list(report.judges.values())

    def row(label: str, of: Callable[[JudgeAgreement], str]) -> tuple[str, ...]:
        return (label, *("" if each.agreement is None else of(each.agreement) for each in judges))

    return [
        ("judge", *report.judges),
        ("Rows scored, of those asked", *(_scored(each) for each in judges)),
        row("Pairs with unequal rewards", lambda found: f"{found.pairs:,}"),
        row("Agreement on pairs", lambda found: _share(found.agreement)),
        row("Pairs to which the judge gives one score", lambda found: percent(found.ties)),
        row("Rank correlation with the reward", lambda found: _plain(found.correlation)),
        row("The same at equal length", lambda found: _plain(found.beyond_length)),
        row("Rank correlation of judge and length", lambda found: _plain(found.length)),
        row("Does not rise above quantile", _place),
        row("Its slope there over its slope below", _rise),
        ("TUP's lambda that this suggests", *(_number(each.truncation) for each in judges)),
        ("Smallest beta with half of the KL below", *(_number(each.least_beta) for each in judges)),
    ]


def _scored(judged: JudgedPool) -> str:
    return f"{judged.asked - sum(judged.statuses.values()):,} of {judged.asked:,}"


def _share(found: Estimate) -> str:
    return f"{percent(found.value)} {interval(found, shares=True)}".rstrip()


def _place(found: JudgeAgreement) -> str:
    if not found.follows:
        return "contradicts it" if found.contradicts else "does not follow it"
    place = found.stops_rising
    return f"{'rises to the top' if place.value >= 1 else f'{place.value:.2f}'} {interval(place)}".rstrip()


def _rise(found: JudgeAgreement) -> str:
    rise = found.rise_above
    return "" if rise is None else f"{rise.value:.2f} {interval(rise)}".rstrip()


def _plain(found: Estimate | None) -> str:
    return "none (constant)" if found is None else f"{found.value:+.2f} {interval(found)}".rstrip()


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"


def group_rows(found: JudgeAgreement) -> list[tuple[str, ...]]:
    """A row for each group of quantiles; the first row is the head."""
    rows: list[tuple[str, ...]] = [
        ("reward's quantile", "rows", "judge's mean quantile", "pairs from here up", "agreement on them")
    ]
    for group in found.groups:
        judge = f"{group.judge.value:.3f} {interval(group.judge)}".rstrip()
        agreement = "" if group.agreement is None else _share(group.agreement)
        rows.append(
            (f"{group.low:.3g} to {group.high:.3g}", f"{group.rows:,}", judge, f"{group.pairs:,}", agreement)
        )
    return rows


def pool_lines(report: PoolReport) -> list[str]:
    """The report as text for a terminal."""
    lines = [f"Pool report of {report.name}. {headline(report)}"]
    lines += [str(each) for each in headlines(report)]
    lines += ["", *table([("pool", ""), *reward_rows(report)]), "", *table(more_rows(report))]
    if report.judges:
        lines += ["", *table(judge_rows(report))]
    for name, judged in report.judges.items():
        if judged.agreement is not None:
            lines += [
                "",
                f"Judge {name} by quantile of the reward:",
                "",
                *table(group_rows(judged.agreement)),
            ]
    return lines
