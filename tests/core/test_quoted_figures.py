"""Figures in the sentences of the documents are those of the result files; tables have tests of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"

Result = dict[str, Any]


def code_reward(found: Result) -> Iterable[str]:
    leetcode, mbpp = found["leetcode_test"], found["mbpp"]
    assert mbpp["passed"] == mbpp["solutions"]
    yield f"({leetcode['passed']} of {leetcode['solutions']} pass) and of MBPP (all {mbpp['solutions']})"


def code_forks(found: Result) -> Iterable[str]:
    def times(other: str) -> tuple[str, str]:
        against = [found[programs]["forked, against"][other] for programs in ("solutions", "wrong")]
        assert [each["rows_with_unequal_scores"] for each in against] == [{}, {}]
        right, wrong = (f"{each['ratio']:.1f} times" for each in against)
        return right, wrong

    right, wrong = times("a sandbox a program")
    yield f"{right} as many right programs a second as a sandbox for each, and {wrong} as many wrong ones"
    right, wrong = times("before")
    yield f"{right} and {wrong} as many as commit {found['commit before'][:7]}"


def comparison_cost(found: Result) -> Iterable[str]:
    demo = found["demo"]
    yield f"took {found['overhead_seconds_of_a_variant']} s on a busy machine"
    yield f"{demo['times_its_own']:.2f} times the {demo['own_seconds']:.0f} s that the demo's took"


def comparison_coverage(found: Result) -> Iterable[str]:
    def between(interval: str, *seeds: int) -> str:
        shares = [100 * each[interval] for each in found["cases"] if each["seeds"] in seeds]
        return f"{min(shares):.0f} to {max(shares):.0f} %"

    yield f"{between('crossed', 5)} of these 95 % intervals contain the true difference with five seeds"
    yield f"{between('crossed', 2, 3)} with two or three"
    yield f"bootstrap of prompts and seeds is at {between('bootstrap', 2, 3)} there"


def plan_times(found: Result) -> Iterable[str]:
    names = (f"experiments/{name}.yaml" for name in ("demo", "arithmetic"))
    demo, sums = (found["experiments"][name]["worst_ratio"] for name in names)
    assert max(demo, sums) <= found["goals"]["ratio"]
    yield f"the worst was {demo:.2f} times off for the demo and {sums:.2f} times for"


def demo(found: Result) -> Iterable[str]:
    run, again = found["run"], found["again"]
    yield f"{run['processor_seconds'] / 60:.0f} minutes of processor time"
    yield f"{run['seconds'] / 60:.0f} by the clock"
    yield f"The same command again takes {again['seconds']:.0f} seconds"
    seeds = found["seeds"]
    assert len(seeds) == 5
    assert min(each["interval"][0] for each in seeds) > 0
    gains = [each["gain"] for each in seeds]
    yield f"gains of {min(gains):+.3f} to {max(gains):+.3f} over five seeds, each interval above 0"
    before, after = (sum(each["cut_percent"][side] for each in seeds) / 5 for side in (0, 1))
    yield f"{before:.1f} % of the replies were cut before, {after:.1f} % after"


def _earlier_demo(found: Result) -> tuple[str, str]:
    (seed,) = found["seeds"]
    low, high = seed["interval"]
    return f"[{seed['gain']:+.3f} ({low:+.3f} to {high:+.3f})]", f"{seed['cut_percent'][1]} %"


def demo_bfloat16_weights(found: Result) -> Iterable[str]:
    gain, cut = _earlier_demo(found)
    yield f"with `auto` it gained {gain}"
    yield f"so no change was shown, and {cut} were cut"


def demo_float32_weights(found: Result) -> Iterable[str]:
    gain, cut = _earlier_demo(found)
    yield f"(5e-5, seed 0) gained {gain}"
    yield f"with float32 weights, and {cut} of its replies were cut"


def form_size(found: Result) -> Iterable[str]:
    short, opened = found["short"], found["opened"]
    yield f"the page has {short['inputs']} inputs over {short['height_px']:,} pixels"
    yield f"a whole experiment opened now is {opened['inputs']} over {opened['height_px']:,}"


def form_size_every_setting(found: Result) -> Iterable[str]:
    yield f"it had {found['short']['inputs']} over {found['short']['height_px']:,}"


def form_submissions(found: Result) -> Iterable[str]:
    form = found["form"]
    assert found["submissions"] == form["runs"]
    yield f"Of {found['submissions']} forms, {found['at_a_time']} submitted at a time"
    yield f"{form['errors']} met an error"
    yield f"less than {form['seconds_median']:.1f} s, the slowest {form['seconds_largest']:.1f} s"


def form_submissions_only_repeated(found: Result) -> Iterable[str]:
    plain, repeated = found["form, plain server"], found["form"]
    yield f"{plain['errors']} met one, and {repeated['errors']} where refused requests were repeated"


def h100(found: Result) -> Iterable[str]:
    scored, checkpointing = found["log_probs"], found["training_with_activation_checkpointing"]
    rate = scored["rows_per_second"] * scored["tokens"] / scored["rows"]
    yield f"{rate:,.0f} tokens/s at {scored['parameters'] / 1e9:.2f}B on an H100"
    yield f"{found['training']['tokens_per_second']:,.0f} tokens/s at 1.24B on an H100"
    yield f"({checkpointing['tokens_per_second']:,.0f} tokens/s in place of {checkpointing['without']:,.0f}"


def killed_run(found: Result) -> Iterable[str]:
    assert found["most_lost_share"] <= found["goals"]["lost_share_of_run_s_at_most"]
    early, late = (
        max(run["lost_s"] for run in found["runs"] if run["after_s"] == after) for after in (30, 120)
    )
    assert early <= 15
    yield f"30 s after its first row, a run lost {early:.1f} s of work at most, and after 120 s {late:.1f} s"


def killed_run_transformers(found: Result) -> Iterable[str]:
    (lost,) = (run["lost_s"] for run in found["runs"] if run["after_s"] == 30)
    assert lost <= 15
    yield f"on two cores {lost:.1f} s after 30 s"


def orchestration(found: Result) -> Iterable[str]:
    yield f"{found['orchestration_seconds']:.0f} s for {found['blocks']:,} blocks of no work"
    yield f"with the record complete {found['record_complete_after_seconds']} s later"


def sampler_logprobs(found: Result) -> Iterable[str]:
    drawn, scored, other = (found["runs"][run] for run in ("sampler", "policy", "policy, another order"))
    assert "differs by 0.24 nats" in drawn["reference_log_probs"]
    yield f"0.24 nats, {100 * drawn['share_of_the_targets_deviation'][0]:.1f} % of the targets'"
    gains = ("{:+.3f} [{:+.3f}, {:+.3f}]".format(*run["reward_difference"]) for run in (drawn, scored))
    yield " in place of ".join(gains)
    yield f"{scored['log_ratio_rms']:.2f} nats in size, are moved by {drawn['from_policy_rms']:.2f} "
    yield f"moves them by {other['from_policy_rms']:.2f}, with a gain of {other['reward_difference'][0]:+.3f}"


def scale_out(found: Result) -> Iterable[str]:
    rows = [found[run]["rows"] for run in ("1_workers", "2_workers", "killed")]
    assert all(each["different"] == each["in_all"] for each in rows)
    yield f"two workers took {found['two_over_one']} of the time of one"
    crashed = f"{found['killed']['dead_run_crashed_after_seconds']:.0f} s"
    yield f"*Crashed* {crashed} later"
    yield f"[measured](#several-workers): {crashed}"


def store_plan(found: Result) -> Iterable[str]:
    for case in ("prompts", "top_up", "scattered"):
        disk, bucket = found[case]["local"], found[case]["s3"]
        cells = (
            f"{disk['seconds']:.0f} s",
            f"{bucket['seconds']:.0f} s",
            f"{max(disk['peak_rss_gb'], bucket['peak_rss_gb']):.1f} GB",
        )
        yield f"| {' | '.join(cells)} |"
        yield f"in {disk['blocks']:,} blocks"


def store_throughput(found: Result) -> Iterable[str]:
    disk, bucket = found["local"], found["s3"]
    written, read = "our_write_to_plain_write", "our_read_to_plain_read"
    yield f"{disk[written]:.2f} and {disk[read]:.2f} of plain pyarrow's speed on a disk"
    yield f"({disk['our_write_to_plain_write_synced']:.1f} of pyarrow with fsync)"
    yield f"{bucket[written]:.2f} and {bucket[read]:.2f} on S3"
    share = "{:.0%} of a read's time on S3 and {:.0%} on a disk".format(
        *(each["shares_of_our_time_last_turn"]["read"]["sha256"] for each in (bucket, disk))
    )
    yield share.replace("%", " %")


def top_up(found: Result) -> Iterable[str]:
    first, second = found["references"]
    (added,) = found["rows_added_a_prompt"]
    yield f"from {first} to {second} added exactly {added} rows a prompt"
    yield f"in {found['stage_over_blocks']} times the time of its blocks"
    yield f"took {found['nothing_missing_seconds']} s, server included"


def vllm_sampling(found: Result) -> Iterable[str]:
    assert found["equal_a_second_time"] == found["equal_in_other_company"] == 1
    yield f"{found['requests']} requests of {found['max_new_tokens']} tokens"
    for side, rounds in (
        ("unseeded", "three rounds from {:.2f} to {:.2f}"),
        ("seeded", "({:.2f} to {:.2f})"),
    ):
        ratios = found["ratios"][f"ours / {side}"]
        yield f"{found['median_ratio'][f'ours / {side}']:.2f} "
        yield rounds.format(min(ratios), max(ratios))


def weights_dtype(found: Result) -> Iterable[str]:
    miss = {
        each["arithmetic"]: each["miss_nats"] for each in found["trained"] if each["learning_rate"] == 5e-6
    }
    rounded = miss["bf16, float32 weights"]
    yield f"{rounded:.1f} nats from its targets, {miss['fp32']:.1f} in fp32"


HOW_TO = "docs/how-to"


@pytest.mark.parametrize(
    ("quoted", "page"),
    [
        (code_forks, f"{HOW_TO}/code-rewards.md"),
        (code_reward, f"{HOW_TO}/code-rewards.md"),
        (comparison_cost, f"{HOW_TO}/compare-objectives.md"),
        (comparison_coverage, f"{HOW_TO}/compare-objectives.md"),
        (demo, "README.md"),
        (demo_bfloat16_weights, "docs/adr/0012-weights-of-training.md"),
        (demo_float32_weights, "docs/adr/0012-weights-of-training.md"),
        (form_size, f"{HOW_TO}/browser.md"),
        (form_size_every_setting, f"{HOW_TO}/browser.md"),
        (form_submissions, f"{HOW_TO}/service.md"),
        (form_submissions_only_repeated, f"{HOW_TO}/service.md"),
        (h100, f"{HOW_TO}/8b-on-8-gpus.md"),
        (killed_run, "docs/concepts/store.md"),
        (killed_run_transformers, "docs/concepts/store.md"),
        (orchestration, f"{HOW_TO}/service.md"),
        (plan_times, f"{HOW_TO}/what-it-costs.md"),
        (sampler_logprobs, f"{HOW_TO}/engines.md"),
        (scale_out, f"{HOW_TO}/service.md"),
        (store_plan, f"{HOW_TO}/store.md"),
        (store_throughput, f"{HOW_TO}/store.md"),
        (top_up, f"{HOW_TO}/store.md"),
        (vllm_sampling, f"{HOW_TO}/engines.md"),
        (weights_dtype, "docs/adr/0012-weights-of-training.md"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_the_sentence_has_the_figures_of_the_file(
    quoted: Callable[[Result], Iterable[str]], page: str
) -> None:
    found = json.loads((RESULTS / f"{quoted.__name__}.json").read_text(encoding="utf-8"))
    text = re.sub(r"\s+", " ", (ROOT / page).read_text(encoding="utf-8"))
    assert [each for each in quoted(found) if each not in text] == []


def test_a_test_reads_every_result_that_a_document_links() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    linked = {
        stem
        for page in pages
        for stem in re.findall(r"benchmarks/results/(\w+)\.json\)", page.read_text(encoding="utf-8"))
    }
    assert len(linked) > 15
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert sorted(stem for stem in linked if not re.search(rf"\b{stem}(\.json\"|, f?\")", tests)) == []
