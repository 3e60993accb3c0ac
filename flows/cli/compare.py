"""`qrpo compare`: check every variant, print the plan, run the flow, print the comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flows.cli.progress_line import progress_line
from flows.cli.run import require_extras, run_flow
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.inspection.comparison_plan import (
    check_variants_memory,
    comparison_plan_lines,
    plan_comparison,
    seeds_of,
)
from qrpo_core.pipeline.comparison import check_choice, comparison_lines
from qrpo_core.pipeline.preflight import check
from qrpo_core.pipeline.variants import check_variants, expand
from qrpo_core.pipeline.workspace import Workspace

if TYPE_CHECKING:
    from flows.compare import Compared


def compare(experiment: Experiment, config: ComparisonConfig, pool: str | None, *, plan_only: bool) -> int:
    """Print what is missing, run the flow unless `plan_only`, print the comparison; returns the exit status.

    Raises QRPOError for bad input; returns 1 where a variant failed.
    """
    require_extras("qrpo compare")
    variants = expand(experiment, config)
    choosing, comparing = seeds_of(variants, config)
    first = variants[0].with_seed((*choosing, *comparing)[0])
    workspace = Workspace(first)
    check(workspace, progress_line("checked", "prompts"))
    check_variants(workspace, variants)
    check_choice(workspace, config, variants)
    planned = plan_comparison(workspace, variants, config)
    print("\n".join(comparison_plan_lines(workspace, planned, config)), flush=True)
    check_variants_memory(workspace, planned, config, pooled=pool is not None)
    if plan_only:
        return 0

    def call(flow: Any) -> Compared:
        from flows.compare import VariantsFailed

        try:
            found: Compared = flow(experiment, config, pool)
        except VariantsFailed as error:
            found = error.compared
        return found

    compared = run_flow(first, "compare", call)
    print("\n" + "\n".join(comparison_lines(workspace, compared.manifest)))
    return 1 if compared.failed else 0
