"""From a stored training set to what the trainer takes, at one objective: the one place where this is done.

QRPO fits each completion to its calibrated target. The baselines take the pairs: dpo, simpo and rebel both
sides, sft the chosen one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import ObjectiveConfig
from qrpo_core.errors import ObjectiveError
from qrpo_core.objective.diagnostics import calibration, length_correlation, reward_diagnostics, saturation
from qrpo_core.objective.normalization import NormalizationCheck, normalization_check
from qrpo_core.objective.targets import CalibratedTargets
from qrpo_core.records import PAIRS, REFERENCE_REWARDS, TRAINING_SET
from qrpo_core.steps.ranked import Ranked, fewest_references
from qrpo_core.steps.tables import load
from qrpo_core.steps.workspace import Workspace
from qrpo_core.store.artifacts import Manifest

if TYPE_CHECKING:
    from qrpo_core.data.collator import Example, Pair


@dataclass(frozen=True)
class TrainingData:
    """A training set at one objective.

    table : TRAINING_SET rows. pairs : PAIRS rows.
    targets : one value per row, float64; None for the baselines, which have none.
    diagnostics : the normalisation check and what else is worth printing (method.md 4).
    """

    table: pa.Table
    pairs: pa.Table
    targets: CalibratedTargets | None
    objective: ObjectiveConfig
    diagnostics: dict[str, Any]

    def items(self) -> list[Example] | list[Pair]:
        """What the trainer takes: completions for qrpo and sft, pairs for the others."""
        from qrpo_core.data.collator import Example, Pair

        names = ("prompt_token_ids", "token_ids", "ref_logprob")
        columns = [self.table[name].to_pylist() for name in names]
        # Where labels decide nothing was scored, and no objective that follows them looks at a reward.
        rewards = self.table["reward"].fill_null(0.0).to_pylist()
        if self.targets is not None:
            aims, betas = self.targets.target.tolist(), self.targets.beta.tolist()
        else:
            aims, betas = [0.0] * len(self.table), [self.objective.beta] * len(self.table)
        rows = [
            Example(prompt, tokens, target=aim, beta=beta, ref_logprob=ref, reward=reward)
            for prompt, tokens, ref, reward, aim, beta in zip(*columns, rewards, aims, betas, strict=True)
        ]
        if self.objective.kind == "qrpo":
            return rows
        keys = zip(self.table["prompt_id"].to_pylist(), self.table["sample_index"].to_pylist(), strict=True)
        place = {key: row for row, key in enumerate(keys)}
        prompts, chosen, rejected = (self.pairs[name].to_pylist() for name in PAIRS.names)
        if self.objective.kind == "sft":
            best = dict.fromkeys(place[key] for key in zip(prompts, chosen, strict=True))
            return [rows[at] for at in best]
        sides = zip(prompts, chosen, rejected, strict=True)
        return [Pair(rows[place[prompt, one]], rows[place[prompt, other]]) for prompt, one, other in sides]


def derive(workspace: Workspace, manifest: Manifest) -> TrainingData:
    """A stored training set at the experiment's objective."""
    experiment = workspace.experiment
    data = training_data(
        load(workspace, manifest, "training_set.parquet", TRAINING_SET),
        load(workspace, manifest, "pairs.parquet", PAIRS),
        load(workspace, manifest, "reference_rewards.parquet", REFERENCE_REWARDS),
        experiment.objective,
        selected=manifest.facts["selected"],
    )
    diagnostics = data.diagnostics | {"temperature": experiment.training_temperature}
    return replace(data, diagnostics=diagnostics)


def training_data(
    table: pa.Table,
    pairs: pa.Table,
    references: pa.Table,
    objective: ObjectiveConfig,
    *,
    selected: bool = False,
) -> TrainingData:
    """See `derive`; TRAINING_SET, PAIRS and REFERENCE_REWARDS rows.

    selected : whether the rows were picked from the references by what they are, so that a mean over them
        is none over the reference policy.

    Raises ObjectiveError where a baseline is left without a pair, or QRPO without a prompt whose references
    are enough for its transform.
    """
    if objective.kind != "qrpo":
        if not len(pairs):
            raise ObjectiveError(
                f"no two of {len(table)} completions are a pair of unequal rewards",
                where="training set",
                remedy="draw more completions, or use a reward that tells them apart",
            )
        return TrainingData(table, pairs, None, objective, _plain_diagnostics(table, pairs, objective))
    return _qrpo(table, pairs, references, objective, selected)


def _qrpo(
    table: pa.Table, pairs: pa.Table, references: pa.Table, objective: ObjectiveConfig, selected: bool
) -> TrainingData:
    asked = pc.count_distinct(table["prompt_id"]).as_py()
    sizes = pc.list_value_length(references["rewards"])
    needed = fewest_references(objective)
    references = references.filter(pc.greater_equal(sizes, needed))
    kept = table.filter(pc.is_in(table["prompt_id"], value_set=references["prompt_id"]))
    if not len(kept):
        raise ObjectiveError(
            f"no prompt has the {needed} scored references that transform {objective.transform!r} needs",
            where="training set",
            remedy="raise sampling.references_per_prompt, or use transform 'identity'",
        )
    ranked = Ranked.of(kept, references, objective)
    targets = ranked.targets(normaliser=objective.normaliser, tie_tolerance=objective.tie_tolerance)
    few = asked - pc.count_distinct(kept["prompt_id"]).as_py()
    diagnostics = _diagnostics(kept, targets, ranked, objective, selected)
    diagnostics |= {"prompts_with_too_few_references": few} if few else {}
    return TrainingData(kept, pairs, targets, objective, diagnostics)


def _plain_diagnostics(table: pa.Table, pairs: pa.Table, objective: ObjectiveConfig) -> dict[str, Any]:
    """What there is to say of a baseline's data."""
    return {
        "objective": objective.kind,
        "beta": objective.beta,
        "training_prompts": pc.count_distinct(pairs["prompt_id"]).as_py(),
        "training_rows": len(table),
        "training_pairs": len(pairs),
        "length_correlation": _correlation(table),
    }


def _diagnostics(
    table: pa.Table, targets: CalibratedTargets, ranked: Ranked, objective: ObjectiveConfig, selected: bool
) -> dict[str, Any]:
    rewards = reward_diagnostics(ranked.reference_codes, ranked.reference_rewards)
    ends = saturation(ranked.counts)
    found: dict[str, Any] = {
        "objective": objective.kind,
        "normaliser": targets.normaliser,
        "convention": objective.convention,
        "transform": objective.transform,
        "beta": objective.beta,
        "training_prompts": pc.count_distinct(table["prompt_id"]).as_py(),
        "training_rows": len(table),
        "references": rewards.references,
        "references_per_prompt": rewards.references / rewards.prompts,
        "tie_rate": rewards.tie_rate,
        "largest_atom": rewards.largest_atom,
        "signal_free_prompts": rewards.signal_free_prompts,
        "better_than_all_references": ends.high,
        "worse_than_all_references": ends.low,
        "length_correlation": _correlation(table),
        "positive_targets": targets.positive_share,
        "largest_log_ratio_target": float(targets.log_ratio.max()),
        "smallest_log_ratio_target": float(targets.log_ratio.min()),
    }
    if objective.beta_scale == "by_length":
        found |= {"mean_beta": float(targets.beta.mean()), "beta_max_binds": targets.beta_max_bound}
    if not ranked.in_pool:
        # Of the references themselves it must be 0 up to noise; of other completions it says how they differ.
        found["quantile_distance_from_uniform"] = calibration(ranked.counts, ranked.seeds).statistic
    return _checks(ranked, targets, objective, ranked.in_pool and not selected) | found


def _checks(
    ranked: Ranked, targets: CalibratedTargets, objective: ObjectiveConfig, drawn: bool
) -> dict[str, Any]:
    """The normalisation check with the normaliser in use, and with the paper's, which knows no ties.

    drawn : whether the training completions are draws from the reference policy, as the check's mean is over.
    """
    if not drawn and objective.beta_scale == "by_length":
        return {}  # it runs over references, and their lengths are not here
    if drawn:
        used, codes = targets, ranked.codes
        paper = ranked.targets(normaliser="population", tie_tolerance=1.0)
    else:
        used = ranked.of_references(normaliser=targets.normaliser, tie_tolerance=1.0)
        codes = ranked.reference_codes
        paper = ranked.of_references(normaliser="population", tie_tolerance=1.0)
    check: NormalizationCheck = normalization_check(used, codes)
    return {
        "normalisation_mean": check.mean,
        "normalisation_standard_error": check.standard_error,
        "normalisation_mean_population": normalization_check(paper, codes).mean,
    }


def _correlation(table: pa.Table) -> float | None:
    """Of reward with log length within prompts; None where one is constant or there are no rewards."""
    if table["reward"].null_count:
        return None
    codes = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(table["token_ids"]).to_numpy()
    found = length_correlation(codes.astype(np.int64), table["reward"].to_numpy(), lengths)
    return None if np.isnan(found) else found
