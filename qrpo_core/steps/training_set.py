"""The training set: tokens, rank counts and reference log-probs in one table; targets derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import ObjectiveConfig
from qrpo_core.ids import tie_seed
from qrpo_core.objective.normalization import normalization_check
from qrpo_core.objective.quantiles import RankCounts, tie_rate
from qrpo_core.objective.targets import CalibratedTargets, calibrated_targets
from qrpo_core.objective.transforms import get_transform
from qrpo_core.records import COMPLETIONS, LOGPROBS, RANK_COUNTS, REFERENCE_REWARDS, TRAINING_SET
from qrpo_core.steps.blocks import LogprobStep
from qrpo_core.steps.tables import load, to_bytes
from qrpo_core.steps.workspace import Built, Workspace
from qrpo_core.store.artifacts import Manifest
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.data.collator import Example

VERSION = 1


def recipe(quantiles: Recipe, logprobs: LogprobStep) -> Recipe:
    """Decided by the rank counts and the log-probs."""
    return Recipe("training_set", VERSION, {}, {"quantiles": quantiles.key, "logprobs": logprobs.recipe.key})


def build(workspace: Workspace, asked: Recipe, quantiles: Manifest, logprobs: LogprobStep) -> Manifest:
    """Commit `training_set.parquet` and the prompts' `reference_rewards.parquet`."""

    def make(scratch: Path) -> Built:
        counts = load(workspace, quantiles, "rank_counts.parquet", RANK_COUNTS)
        pairs = list(zip(counts["prompt_id"].to_pylist(), counts["sample_index"].to_pylist(), strict=True))
        samples = logprobs.samples
        drawn = workspace.blocks.read_pairs(samples.recipe, pairs, COMPLETIONS)
        scored = workspace.blocks.read_pairs(logprobs.recipe, pairs, LOGPROBS)
        chat = workspace.chat(samples.policy.directory)
        turns = dict(
            zip(
                samples.prompts["prompt_id"].to_pylist(), samples.prompts["messages"].to_pylist(), strict=True
            )
        )
        tokens = {
            prompt: list(chat.prompt_token_ids(turns[prompt])) for prompt in {prompt for prompt, _ in pairs}
        }
        table = counts.append_column(
            "prompt_token_ids", pa.array([tokens[prompt] for prompt, _ in pairs], pa.list_(pa.int32()))
        )
        table = table.append_column("token_ids", drawn["token_ids"]).append_column(
            "ref_logprob", scored["logprob"]
        )
        files: dict[str, Path | bytes] = {
            "training_set.parquet": to_bytes(table, TRAINING_SET, "training set"),
            "reference_rewards.parquet": workspace.artifacts.read(quantiles, "reference_rewards.parquet"),
        }
        cut = int(pc.sum(pc.equal(drawn["finish_reason"], "length")).as_py() or 0)
        return files, {"rows": len(table), "prompts": len(tokens), "truncated": cut}

    return workspace.make(asked, make)


@dataclass(frozen=True)
class TrainingData:
    """A training set with its targets at one objective.

    table : TRAINING_SET rows.
    targets : one value per row, float64.
    diagnostics : the normalisation check and what else is worth printing (method.md 4).
    """

    table: pa.Table
    targets: CalibratedTargets
    diagnostics: dict[str, Any]

    def examples(self) -> list[Example]:
        """The rows as the trainer takes them."""
        from qrpo_core.data.collator import Example

        columns = [self.table[name].to_pylist() for name in ("prompt_token_ids", "token_ids", "ref_logprob")]
        rows = zip(*columns, self.targets.target.tolist(), self.targets.beta.tolist(), strict=True)
        return [Example(prompt, tokens, target, beta, ref) for prompt, tokens, ref, target, beta in rows]


def derive(workspace: Workspace, manifest: Manifest) -> TrainingData:
    """Targets from stored rank counts at the experiment's objective: the one place where this is done."""
    table = load(workspace, manifest, "training_set.parquet", TRAINING_SET)
    references = load(workspace, manifest, "reference_rewards.parquet", REFERENCE_REWARDS)
    return targets_of(table, references, workspace.experiment.objective)


def targets_of(table: pa.Table, references: pa.Table, objective: ObjectiveConfig) -> TrainingData:
    """See `derive`; table is TRAINING_SET, references is REFERENCE_REWARDS."""
    position = {prompt: code for code, prompt in enumerate(references["prompt_id"].to_pylist())}
    prompts, indices = table["prompt_id"].to_pylist(), table["sample_index"].to_pylist()
    codes = np.array([position[prompt] for prompt in prompts], np.int64)
    lists = references["rewards"].combine_chunks()
    sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    reference_codes = np.repeat(np.arange(len(references)), sizes)
    reference_rewards = lists.flatten().to_numpy(zero_copy_only=False)
    counts = RankCounts(*(table[name].to_numpy() for name in ("below", "equal", "n")))
    randomized = objective.convention == "randomized"
    how = partial(
        calibrated_targets,
        counts,
        transform=get_transform(objective.transform),
        beta=objective.beta,
        convention=objective.convention,
        prompt=codes,
        reference_prompt=reference_codes,
        reference_rewards=reference_rewards,
        seeds=_seeds(prompts, indices) if randomized else None,
        reference_seeds=_reference_seeds(references, sizes) if randomized else None,
    )
    targets = how(normaliser=objective.normaliser)
    # What the paper's normaliser, which knows no ties, would have made of the same rewards.
    paper = how(normaliser="population", tie_tolerance=1.0)
    diagnostics = _diagnostics(table, targets, codes, objective) | {
        "normalisation_mean_population": normalization_check(paper, codes).mean,
        "references": len(reference_rewards),
        "tie_rate": tie_rate(reference_codes, reference_rewards),
    }
    return TrainingData(table, targets, diagnostics)


def _seeds(prompts: list[str], indices: list[int]) -> Any:
    return np.array([tie_seed(*pair) for pair in zip(prompts, indices, strict=True)], np.uint64)


def _reference_seeds(references: pa.Table, sizes: Any) -> Any:
    pairs = [
        (prompt, at)
        for prompt, size in zip(references["prompt_id"].to_pylist(), sizes, strict=True)
        for at in range(size)
    ]
    return np.array([tie_seed(*pair) for pair in pairs], np.uint64)


def _diagnostics(
    table: pa.Table, targets: CalibratedTargets, codes: Any, objective: ObjectiveConfig
) -> dict[str, Any]:
    # The training completions are the references, so the check runs over the targets themselves.
    check = normalization_check(targets, codes)
    tied_with_all = table["equal"].to_numpy() == table["n"].to_numpy()
    with_signal = np.bincount(codes, weights=~tied_with_all) > 0
    return {
        "normalisation_mean": check.mean,
        "normalisation_standard_error": check.standard_error,
        "normaliser": targets.normaliser,
        "convention": objective.convention,
        "transform": objective.transform,
        "beta": objective.beta,
        "training_prompts": len(with_signal),
        "training_rows": len(table),
        "signal_free_prompts": int((~with_signal).sum()),
        "positive_targets": targets.positive_share,
        "largest_log_ratio_target": float(targets.log_ratio.max()),
        "smallest_log_ratio_target": float(targets.log_ratio.min()),
    }
