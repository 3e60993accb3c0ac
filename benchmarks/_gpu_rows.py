"""The table of the GPU benchmark: the rows that each part's result file makes, with the project's goals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: What the settings of gpu_training.py are called in the table.
SETTINGS = {
    "ours_dpo": "DPO",
    "ours_qrpo": "QRPO",
    "ours_dpo_bfloat16_weights": "DPO, bfloat16 weights",
    "ours_dpo_checkpointing": "DPO, activations computed again",
    "ours_dpo_uncompiled": "DPO, not compiled",
}
#: Those whose arithmetic is TRL's: the goals are for them.
SAME_ARITHMETIC = ("ours_dpo", "ours_qrpo")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    ratio : of what was measured, in the direction of the goal. least, most : the goal, where there is one.
    reason : why it was not measured.
    """

    what: str
    measured: str = ""
    ratio: float | None = None
    least: float | None = None
    most: float | None = None
    reason: str | None = None

    @property
    def goal(self) -> str:
        """The goal as the table has it."""
        if self.least is not None:
            return f">= {self.least:g}"
        return "" if self.most is None else f"<= {self.most:g}"

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal or a number."""
        if self.ratio is None or (self.least is None and self.most is None):
            return None
        return self.ratio >= self.least if self.least is not None else self.ratio <= (self.most or 0.0)

    def told(self) -> dict[str, Any]:
        """The row for a result file."""
        return {
            "what": self.what,
            "measured": self.measured,
            "goal": self.goal,
            "ratio": self.ratio,
            "met": self.met,
            "not_measured": self.reason,
        }

    def line(self, judged: bool = True) -> str:
        """The row as a line of Markdown; judged : say whether the goal is met."""
        if self.reason is not None:
            return f"| {self.what} | not measured: {self.reason.replace('|', '/')} | {self.goal} | |"
        shown = "" if self.ratio is None else f"{self.ratio:.2f}"
        mark = {True: " met", False: " **missed**", None: ""}[self.met if judged else None]
        return f"| {self.what} | {self.measured} | {self.goal} | {shown}{mark} |"


def markdown(rows: list[Row], judged: bool = True) -> str:
    """The table."""
    head = "| what | measured | goal | ratio |\n|---|---|---|---|\n"
    return head + "".join(f"{row.line(judged)}\n" for row in rows)


def training(result: dict[str, Any]) -> list[Row]:
    """Of gpu_training.py."""
    model, runs, rows = result["model"], result["runs"], []
    theirs, same = runs.get("trl_dpo"), result.get("largest_difference_from_trl", {})
    for name, title in SETTINGS.items():
        if name not in runs:
            continue
        run, goal = runs[name], name in SAME_ARITHMETIC
        rate, peak = f"{run['tokens_per_second']:,.0f} tokens/s", f"{run['peak_memory_gb']:.1f} GB"
        ratio: dict[str, Any] = {"tokens_per_second": None, "peak_memory": None}
        if theirs is not None:
            ratio = result["ratios_ours_over_trl"][name]
            rate += f" / TRL DPO {theirs['tokens_per_second']:,.0f}"
            peak += f" / {theirs['peak_memory_gb']:.1f}"
        here = f"{title}, {model}"
        rows.append(Row(f"{here}: steps", rate, ratio["tokens_per_second"], least=1.5 if goal else None))
        rows.append(Row(f"{here}: peak memory", peak, ratio["peak_memory"], most=0.5 if goal else None))
        if "share_of_bf16_rate" in run:
            share, least = run["share_counting_every_token"], 0.35 if goal and model == "1b" else None
            tflops = runs["ours_rate"]["bf16_tflops"]
            measured = (
                f"of {tflops:,.0f} TFLOP/s; {run['share_of_bf16_rate']:.3f} with the head at completions only"
            )
            rows.append(Row(f"{here}: share of the chip", measured, share, least=least))
        if "formula_memory_gb" in run and result["hardware"]["gpu"]:
            measured = f"{run['formula_memory_gb']:.1f} GB by formula / {run['peak_memory_gb']:.1f} GB"
            rows.append(
                Row(f"{here}: memory by formula", measured, run["formula_memory_gb"] / run["peak_memory_gb"])
            )
        if goal:
            most = max(run["passes"])
            beside = f"; TRL {max(theirs['passes'])}" if theirs else ""
            rows.append(Row(f"{here}: passes of a step", f"{most}{beside}", float(most), most=1.0))
        if name in same and goal:
            found = same[name]
            apart = f"losses {found['loss_nats']:g} nats, norms {found['gradient_norm_relative']:g} apart"
            explained = "" if found["explained_by_rounding"] else ": **more than rounding**"
            rows.append(Row(f"{here}: the same computation as TRL", apart + explained))
    return rows


def reference_logprobs(result: dict[str, Any]) -> list[Row]:
    """Of reference_logprobs.py."""
    rates, what = result["rows_per_second"], f"reference log-probs, {result['model']}"
    measured = f"{rates['ours']:g} rows/s / one padded row at a time {rates['padded']:g}"
    rows = [Row(what, measured, result["ours_to_padded"]["median"], least=6.0)]
    errors = result["errors_against_float32_nats"]
    if errors is not None:
        shown = {name: f"{found['mean']:.3f} / {found['largest']:.2f}" for name, found in errors.items()}
        measured = f"{shown['ours']} nats (mean / largest); plain forward {shown['padded']}"
        ratio = errors["ours"]["mean"] / errors["padded"]["mean"]
        rows.append(Row(f"{what}: error against float32", measured, ratio, most=1.0))
    return rows


def sampling(result: dict[str, Any]) -> list[Row]:
    """Of gpu_sampling.py."""
    rows = []
    for size, found in result["batch_sizes"].items():
        what = f"engine transformers, {result['model']}, batch size {size}"
        measured, ratio = f"{found['tokens_per_second']:,.0f} tokens/s", found.get("ours_to_generate")
        if ratio is not None:
            measured += f" / generate {found['generate_tokens_per_second']:,.0f}"
        rows.append(Row(what, measured, ratio, least=None if ratio is None else 1.0))
        if "equal_a_second_time" in found:
            again, company = found["equal_a_second_time"], found["equal_in_other_company"]
            rows.append(
                Row(f"{what}: equal rows", f"{again:.1%} drawn again, {company:.1%} in other company")
            )
    return rows


def head(result: dict[str, Any]) -> list[Row]:
    """Of head.py."""
    ours, plain, what = result["ours"], result["plain"], f"output head alone, {result['model']}"
    times = f"{1e3 * ours['seconds']:.1f} ms / plain logits {1e3 * plain['seconds']:.1f}"
    memory = f"{ours['peak_memory_gb']:.2f} GB / {plain['peak_memory_gb']:.2f} above states and gradients"
    rows = [
        Row(f"{what}: rate", times, plain["seconds"] / ours["seconds"]),
        Row(
            f"{what}: share of the chip",
            f"plain {plain['share_of_bf16_rate']:.3f}",
            ours["share_of_bf16_rate"],
        ),
        Row(f"{what}: memory", memory),
    ]
    if (compiled := result.get("compiled")) is not None:
        times = f"{1e3 * compiled['seconds']:.1f} ms / uncompiled {1e3 * ours['seconds']:.1f}"
        rows.append(Row(f"{what}: compiled", times, ours["seconds"] / compiled["seconds"]))
    return rows


def logprob_error(result: dict[str, Any]) -> list[Row]:
    """Of logprob_error.py: the errors of each way, and of a plain forward's."""
    found = result["errors_nats"]
    beside = found["plain, a row at a time"]["mean_size"]
    rows = []
    for way, errors in found.items():
        what = f"bfloat16 against float32, {result['model']}: {way}"
        if isinstance(errors, str):
            rows.append(Row(what, errors))
        else:
            measured = f"{errors['mean_size']:.3f} / {errors['largest']:.2f} nats (mean / largest)"
            most = 1.0 if way == "engine" else None
            rows.append(Row(what, measured, errors["mean_size"] / beside, most=most))
    return rows


def vllm(result: dict[str, Any]) -> list[Row]:
    """Of vllm_sampling.py."""
    rates = {name: sorted(each)[len(each) // 2] for name, each in result["tokens_per_second"].items()}
    rows = []
    for side, least in (("unseeded", 0.97), ("seeded", None)):
        measured = f"{rates['ours']:,.0f} tokens/s / {rates[side]:,.0f}"
        ratio = result["median_ratio"][f"ours / {side}"]
        rows.append(Row(f"engine vllm / bare vLLM, {side}", measured, ratio, least=least))
    kinds = [
        ("engine vllm: equal rows", result),
        ("batch-invariant: equal rows", result.get("batch_invariant", {})),
    ]
    for what, found in kinds:
        if "equal_a_second_time" in found:
            again, company = found["equal_a_second_time"], found["equal_in_other_company"]
            rows.append(Row(what, f"{again:.1%} drawn again, {company:.1%} in other company"))
    if "batch_invariant" in result:
        found = result["batch_invariant"]
        measured = f"{found['tokens_per_second']:,.0f} tokens/s / {rates['ours']:,.0f} without"
        rows.append(Row("engine vllm, batch-invariant", measured, found["of_our_rate"]))
    return rows


ROWS_OF: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "training_135m": training,
    "training_1b": training,
    "reference_logprobs": reference_logprobs,
    "sampling": sampling,
    "head": head,
    "logprob_error": logprob_error,
    "vllm": vllm,
}
