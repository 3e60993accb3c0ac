"""The example completions of a report, as Markdown for the UI."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qrpo_core.common.schemas import PROMPTS
from qrpo_core.evaluation.inputs import EVALUATED, EVALUATED_AFTER
from qrpo_core.inspection.result import Results
from qrpo_core.pipeline.workspace import Workspace

#: Longest text that is shown, in characters; the report has all of it.
_LONGEST = 800


def example_lines(workspace: Workspace, made: Results) -> list[str]:
    """The report's examples: each prompt with a completion before and after training, and their rewards."""
    from qrpo_core.reporting.html.examples import EXAMPLE_RULE, pick_examples

    before = workspace.load(made.evaluate, "before.parquet", EVALUATED)
    after = workspace.load(made.evaluate, "after.parquet", EVALUATED_AFTER)
    prompts = workspace.load(made.prompts, "prompts.parquet", PROMPTS)
    lines = ["### Example completions", EXAMPLE_RULE]
    for each in pick_examples(before, after, prompts):
        rewards = [f"{name}, reward {each[f'reward_{name}']:.4g}" for name in ("before", "after")]
        lines += [
            f"**{each['label'].capitalize()}** · prompt `{each['prompt_id'][:8]}`",
            fenced(each["prompt"]),
        ]
        for what, text in zip(rewards, (each["before"], each["after"]), strict=True):
            lines += [f"*{what}*", fenced(text)]
    return lines


def fenced(text: str) -> str:
    """The text in a fence that is longer than any in it, so that nothing of it is read as Markdown."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    longest: Sequence[str] = re.findall("`+", shown)
    fence = "`" * max(3, 1 + max(map(len, longest), default=0))
    return f"{fence}text\n{shown or '(empty)'}\n{fence}"
