"""An explanation as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from qrpo_core.common.formatting import to_the_second
from qrpo_core.reporting.text_table import table

Row = dict[str, Any]

#: Characters of a completion in a table of many.
_SNIPPET = 48
#: Characters of a ground truth; that of a generated task holds the whole task.
_GROUND_TRUTH = 160

_NAMES = {
    "sample_index": "index",
    "num_tokens": "tokens",
    "finish_reason": "ended by",
    "log_ratio_target": "log-ratio target",
}


def explain_lines(found: Row) -> list[str]:
    """The result of `explain` as lines."""
    lines = [*_prompt(found["prompt"]), *_budget(found.get("budget"))]
    for section in found["draws"]:
        lines.append("")
        lines += _overview(section) if "completions" in section else _completion(section)
    return lines


def _prompt(row: Row) -> Iterator[str]:
    yield f"Prompt {row['prompt_id']}, {row['split'].replace('_', '-')}, from {row['source']}"
    for turn in row["messages"]:
        yield f"  {turn['role']}: {one_line(turn['content'])}"
    if row["ground_truth"] is not None:
        yield f"Ground truth: {one_line(row['ground_truth'], _GROUND_TRUTH)}"


def _budget(budget: Row | None) -> Iterator[str]:
    if budget is None:
        return
    own = budget["of_this_prompt"]
    text = f"Budget: {budget['references']} references (every prompt {budget['of_every_prompt']}"
    text += f", this one {own})" if own is not None else ")"
    text += f", {budget['drawn']} drawn"
    yield text + (f", {budget['drawn_beyond']} more than asked for" if budget["drawn_beyond"] else "")


def _head(section: Row) -> str:
    policy = section["policy"]
    return f"{section['name'].capitalize()}: " + (
        "from the data set" if policy is None else f"drawn from policy {policy}"
    )


def _overview(section: Row) -> Iterator[str]:
    yield _head(section)
    rows = section["completions"]
    if rows:
        names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        yield from table(
            [[_NAMES.get(name, name) for name in names], *([_cell(row, n) for n in names] for row in rows)]
        )
    yield from _shared(section)


def _shared(section: Row) -> Iterator[str]:
    """The data that the completions of the prompt share, and the notes."""
    if section.get("reference_rewards"):
        rewards = section["reference_rewards"]
        yield f"Ranked among {len(rewards)} references with rewards {counted(rewards)}"
    if section.get("objective"):
        facts = section["objective"].items()
        yield "Objective: " + ", ".join(f"{name} {number(value)}" for name, value in facts)
    for note in section["notes"]:
        yield f"Note: {note}"


def _completion(section: Row) -> Iterator[str]:
    yield _head(section)
    rows = [("", ""), *_drawn(section["completion"]), *_scored(section), *_ranked(section)]
    rows += [(each["step"], f"{number(each['logprob'])} nats") for each in section["logprobs"]]
    if section.get("ref_logprob") is not None:
        rows.append(("reference log-prob, training set", f"{number(section['ref_logprob'])} nats"))
    rows += [("pair", _pair(each)) for each in section.get("pairs", ())]
    for each in section.get("data_set", ()):
        rows.append(("in the data set", _given(each)))
    yield from table(rows)[2:]
    yield from _shared(section)
    yield from _provenance(section)


def _drawn(row: Row | None) -> Iterator[tuple[str, str]]:
    if row is None:
        return
    yield "text", repr(row["text"])
    if row["num_tokens"] is not None:
        end = "" if row["finish_reason"] is None else f", ended by {row['finish_reason']}"
        yield "tokens", f"{row['num_tokens']}{end}"
    if "seed" in row:
        yield "seed", str(row["seed"])
        yield "engine", row["engine"]
        yield "log-prob under the sampler", f"{number(row['logprob'])} nats"


def _scored(section: Row) -> Iterator[tuple[str, str]]:
    row = section["reward"]
    if section.get("graded") is not None:
        yield "graded part", repr(section["graded"])
    if row is not None:
        yield "reward", _reward(row)
    for each in section["every_reward"]:
        if each["used"] and row is not None and each["ground_truth_digest"] == row["ground_truth_digest"]:
            continue
        against = (
            f", against ground truth {each['ground_truth_digest']}" if each["ground_truth_digest"] else ""
        )
        scorer = f"{each['scorer']['config']['kind']!r}, recipe {each['recipe']}"
        yield "other reward", f"{_reward(each)} by {scorer}{against}"


def _reward(row: Row) -> str:
    detail = f" ({row['detail']})" if row["detail"] else ""
    return f"{number(row['reward'])}, status {row['status']}{detail}"


def _ranked(section: Row) -> Iterator[tuple[str, str]]:
    ranks, targets = section.get("ranks"), section.get("targets")
    if ranks is not None:
        pool = "itself one of them, left out" if ranks["in_pool"] else "itself none of them"
        yield (
            "rank among references",
            (f"{ranks['below']} below, {ranks['equal']} equal, of {ranks['n']}; {pool}"),
        )
        interval = ranks["interval"]
        if interval is not None:
            ends = f"{number(interval['lower'])} to {number(interval['upper'])}"
            yield f"exact {interval['level']:.0%} interval of P(R' <= R)", ends
    if targets is not None:
        log_z = f"{number(targets['log_partition'])} nats at beta {number(targets['beta'])}"
        if targets["target"] is None:
            yield "quantile", number(targets["quantile"])
            yield "log Z", log_z
            yield "target", "probability 0: the quantile is not above objective.truncation"
            return
        yield "quantile", f"{number(targets['quantile'])}, transformed {number(targets['transformed'])}"
        yield "log Z", log_z
        yield "target", f"{number(targets['target'])} reward units"
        yield "log-ratio target", f"{number(targets['log_ratio_target'])} nats"


def _pair(row: Row) -> str:
    return f"{row['chosen']} preferred to {row['rejected']}"


def _given(row: Row) -> str:
    pair = "" if row["pair"] is None else f", {row['label']} in pair {row['pair']}"
    grade = "" if row["reward"] is None else f", reward {number(row['reward'])}"
    return f"{row['source']}{pair}{grade}"


def _provenance(section: Row) -> Iterator[str]:
    if section["blocks"]:
        yield ""
        rows = [("what", "block of", "created", "code", "facts")]
        for block in section["blocks"]:
            facts = ", ".join(f"{name} {number(value)}" for name, value in block["facts"].items())
            place = f"{block['step']}/{block['recipe']}/{block['block']}"
            rows.append((block["what"], place, to_the_second(block["created"]), block["code"], facts))
        yield from table(rows)
    yield ""
    head = ("artifact", "recipe", "created", "code")
    made = [
        (a["step"], a["recipe"], to_the_second(a["created"] or "not yet"), a["code"] or "")
        for a in section["artifacts"]
    ]
    yield from table([head, *made])


def _cell(row: Row, name: str) -> str:
    value = row[name]
    return one_line(value, _SNIPPET) if name == "text" else number(value)


def number(value: Any) -> str:
    """A float with six significant digits; "-" for None; anything else unchanged."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def counted(values: Sequence[float]) -> str:
    """Sorted values as text, equal ones together: 0 (3x), 0.5, 1 (2x)."""
    counts = [(value, len(list(group))) for value, group in groupby(values)]
    return ", ".join(number(value) + (f" ({count}x)" if count > 1 else "") for value, count in counts)


def one_line(text: str, most: int | None = None) -> str:
    """Text without line breaks and control characters, cut after `most` characters."""
    flat = "".join(letter if letter.isprintable() else "·" for letter in " ".join(text.split()))
    return flat if most is None or len(flat) <= most else flat[: most - 1] + "…"
