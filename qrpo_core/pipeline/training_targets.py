"""The trainer's items and targets, from a stored training set and an objective. No other module does this.

qrpo and its kin fit each completion to its target. The others use the pairs: dpo, simpo and rebel both sides,
sft the chosen one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ObjectiveError
from qrpo_core.common.schemas import COMPARED_LOGPROBS, PAIRS, REFERENCE_REWARDS, TRAINING_SET
from qrpo_core.config import ObjectiveConfig
from qrpo_core.objective.clipping import clip_log_ratio
from qrpo_core.objective.diagnostics import (
    length_correlation,
    rank_uniformity,
    reward_diagnostics,
    saturation,
)
from qrpo_core.objective.quantiles import RankCounts
from qrpo_core.objective.targets import CalibratedTargets
from qrpo_core.objective_kinds import KINDS
from qrpo_core.objective_kinds.targets import Pool, QuantileObjective, TargetObjective
from qrpo_core.pipeline.normalisation import normalisation_facts
from qrpo_core.pipeline.ranked import ranked_pool, target_objective
from qrpo_core.pipeline.sampler_logprobs import FILE, EngineDifference, differences, summary
from qrpo_core.pipeline.workspace import Workspace
from qrpo_core.store.manifest import Manifest

if TYPE_CHECKING:
    from qrpo_core.data.collator import ExampleColumns, PairColumns


@dataclass(frozen=True)
class TrainingData:
    """A training set with the targets of one objective.

    table : TRAINING_SET rows. pairs : PAIRS rows.
    targets : the calibrated targets of the rows; None for the baselines.
    diagnostics : the normalisation check and other numbers for the report (docs/reference/method.md,
        section 4).
    compared : how far the sampler's log-probs are from the training model's, where they are the reference
        log-probs.
    """

    table: pa.Table
    pairs: pa.Table
    targets: CalibratedTargets | None
    objective: ObjectiveConfig
    diagnostics: dict[str, Any]
    compared: tuple[EngineDifference, ...] = ()

    def items(self) -> ExampleColumns | PairColumns:
        """The trainer's items: completions or pairs, as the objective takes them."""
        from qrpo_core.data.collator import ExampleColumns, PairColumns

        table = self.table
        rows = len(table)
        targets = self.targets
        examples = ExampleColumns(
            table["prompt_token_ids"],
            table["token_ids"],
            target=np.zeros(rows) if targets is None else targets.target,
            beta=np.full(rows, self.objective.beta) if targets is None else targets.beta,
            ref_logprob=table["ref_logprob"].to_numpy(),
            # If labels decide, there are no rewards, and the objectives that follow labels read none.
            reward=table["reward"].fill_null(0.0).to_numpy(),
            log_partition=np.zeros(rows) if targets is None else targets.log_partition,
        )
        taken = KINDS[self.objective.kind].items
        if taken == "completions":
            return examples
        keys = zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        row_of = {key: row for row, key in enumerate(keys)}
        prompts, chosen, rejected = (self.pairs[name].to_pylist() for name in PAIRS.names)
        sides = [
            np.array([row_of[key] for key in zip(prompts, side, strict=True)], np.int64)
            for side in (chosen, rejected)
        ]
        if taken == "chosen":
            return replace(examples, rows=np.array(list(dict.fromkeys(sides[0].tolist())), np.int64))
        return PairColumns(examples, *sides)


def derive(workspace: Workspace, manifest: Manifest) -> TrainingData:
    """The stored training set with the targets of the experiment's objective."""
    experiment = workspace.experiment
    data = training_data(
        workspace.load(manifest, "training_set.parquet", TRAINING_SET),
        workspace.load(manifest, "pairs.parquet", PAIRS),
        workspace.load(manifest, "reference_rewards.parquet", REFERENCE_REWARDS),
        experiment.objective,
        selected=manifest.facts["selected"],
    )
    diagnostics = data.diagnostics | {"temperature": experiment.training_temperature}
    if FILE not in manifest.files or data.targets is None:
        return replace(data, diagnostics=diagnostics)
    compared = differences(workspace.load(manifest, FILE, COMPARED_LOGPROBS), data.table, data.targets)
    diagnostics["reference_logprobs"] = summary(compared)
    return replace(data, diagnostics=diagnostics, compared=compared)


def training_data(
    table: pa.Table,
    pairs: pa.Table,
    references: pa.Table,
    objective: ObjectiveConfig,
    *,
    selected: bool = False,
) -> TrainingData:
    """The training set with the targets of an objective.

    table, pairs, references : TRAINING_SET, PAIRS and REFERENCE_REWARDS rows.
    selected : whether completions were left out because they were cut. Then a mean over the rows does not
        estimate a mean over the reference policy.

    Raises ObjectiveError if an objective of pairs has none, or if no prompt has enough references for its
    targets.
    """
    if not objective.has_targets:
        if not len(pairs):
            raise ObjectiveError(
                f"no two of {len(table)} completions are a pair of unequal rewards",
                where="training set",
                remedy="draw more completions, or use a reward that tells them apart",
            )
        return TrainingData(table, pairs, None, objective, _plain_diagnostics(table, pairs, objective))
    return _with_targets(table, pairs, references, objective, selected)


def _with_targets(
    table: pa.Table, pairs: pa.Table, references: pa.Table, objective: ObjectiveConfig, selected: bool
) -> TrainingData:
    kind = target_objective(objective)
    prompts_before = pc.count_distinct(table["prompt_id"]).as_py()
    sizes = pc.list_value_length(references["rewards"])
    needed = kind.fewest_references
    references = references.filter(pc.greater_equal(sizes, needed))
    kept = table.filter(pc.is_in(table["prompt_id"], value_set=references["prompt_id"]))
    if not len(kept):
        raise ObjectiveError(
            f"no prompt has the {needed} scored references that {kind.needs_them} needs",
            where="training set",
            remedy="raise sampling.references_per_prompt"
            + (", or use transform 'identity'" if "transform" in kind.shares else ""),
        )
    pool = ranked_pool(kept, references, objective)
    exact = kind.targets(pool, normaliser=objective.normaliser, tie_tolerance=objective.tie_tolerance)
    targets, cut = exact, {}
    if objective.target_clip is not None:
        targets, binds = clip_log_ratio(exact, objective.target_clip)
        cut = {"target_clip": objective.target_clip, "target_clip_binds": binds}
    few = prompts_before - pc.count_distinct(kept["prompt_id"]).as_py()
    checks = _checks(pool, exact, kind, pool.in_pool and not selected)
    diagnostics = checks | _diagnostics(kept, targets, pool, kind) | cut
    diagnostics |= {"prompts_with_too_few_references": few} if few else {}
    return TrainingData(kept, pairs, targets, objective, diagnostics)


def _plain_diagnostics(table: pa.Table, pairs: pa.Table, objective: ObjectiveConfig) -> dict[str, Any]:
    """The diagnostics of a baseline's data."""
    return {
        "objective": objective.kind,
        "beta": objective.beta,
        "training_prompts": pc.count_distinct(pairs["prompt_id"]).as_py(),
        "training_rows": len(table),
        **_sources(table),
        "training_pairs": len(pairs),
        "length_correlation": _correlation(table),
    }


def _diagnostics(
    table: pa.Table, targets: CalibratedTargets, pool: Pool, kind: TargetObjective
) -> dict[str, Any]:
    rewards = reward_diagnostics(pool.reference_codes, pool.reference_rewards)
    ends = saturation(pool.counts)
    asked = targets.log_ratio[np.isfinite(targets.log_ratio)]
    found: dict[str, Any] = {
        "objective": kind.kind,
        **({"normaliser": targets.normaliser} if kind.normalised else {}),
        **kind.facts(),
        "training_prompts": pc.count_distinct(table["prompt_id"]).as_py(),
        "training_rows": len(table),
        **_sources(table),
        "references": rewards.references,
        "references_per_prompt": rewards.references / rewards.prompts,
        "tie_rate": rewards.tie_rate,
        "largest_atom": rewards.largest_atom,
        "signal_free_prompts": rewards.signal_free_prompts,
        "better_than_all_references": ends.high,
        "worse_than_all_references": ends.low,
        "length_correlation": _correlation(table),
        "positive_targets": targets.positive_share,
    }
    if len(asked):
        found |= {
            "largest_log_ratio_target": float(asked.max()),
            "smallest_log_ratio_target": float(asked.min()),
        }
    if len(asked) < len(targets):
        found["zero_targets"] = len(targets) - len(asked)
    if kind.config.beta_scale == "by_length":
        found |= {"mean_beta": float(targets.beta.mean()), "beta_max_binds": targets.beta_max_bound}
    if not pool.in_pool:
        # It is 0 up to noise for draws of the reference policy; for others it measures how they differ.
        others = ~table["in_pool"].to_numpy()
        counts = RankCounts(*(getattr(pool.counts, name)[others] for name in ("below", "equal", "n")))
        found["quantile_distance_from_uniform"] = rank_uniformity(counts, pool.seeds[others]).statistic
    return found


def _sources(table: pa.Table) -> dict[str, int]:
    """In mode mixed how many rows are samples, and how many the data set's own completions; else nothing."""
    sampled = pc.sum(table["in_pool"]).as_py()
    if sampled in (0, len(table)):
        return {}
    return {"training_samples": sampled, "training_offline": len(table) - sampled}


def _checks(pool: Pool, targets: CalibratedTargets, kind: TargetObjective, drawn: bool) -> dict[str, Any]:
    if isinstance(kind, QuantileObjective) and kind.normalised:
        return normalisation_facts(pool, targets, kind, drawn)
    return {}


def _correlation(table: pa.Table) -> float | None:
    """The correlation of reward and log length within prompts; None without rewards or if one is constant."""
    if table["reward"].null_count:
        return None
    codes = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(table["token_ids"]).to_numpy()
    found = length_correlation(codes.astype(np.int64), table["reward"].to_numpy(), lengths)
    return None if np.isnan(found) else found
