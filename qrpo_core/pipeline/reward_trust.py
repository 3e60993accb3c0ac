"""Checks of an experiment's rewards on a few prompts, made once and kept in the store.

The facts of the `usable` artifact hold the problems that `rewards.trust` finds. `reward.trust` decides at
every start whether a problem ends the run or becomes a headline.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.hashing import digest_json
from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.rewards.registry import reward_doubts, reward_identity
from qrpo_core.rewards.trust import terms

#: The problems found by this process, by digest of their inputs: preflight and the run both need them.
_FOUND: dict[str, list[dict[str, Any]]] = {}


def reward_problems(
    experiment: Experiment, prompts: pa.Table, left_out: Iterable[str | None], prompts_key: str
) -> list[dict[str, Any]]:
    """The problems of the reward, tried on all prompts, and of each judge, tried on held-out ones.

    left_out : ids of unusable prompts. prompts_key : the key of the prompts' recipe.
    Returns JSON-ready dicts: the scorer's place in the experiment, its kind, and the fields of
    `rewards.trust.Doubt`.
    """
    gone = sorted({each for each in left_out if each is not None})
    scorers = _scorers(experiment)
    identities = {name: reward_identity(scorer) for name, scorer in scorers.items()}
    key = digest_json({"prompts": prompts_key, "left_out": gone, "scorers": identities})
    if key not in _FOUND:
        good = prompts.filter(
            pc.invert(pc.is_in(prompts["prompt_id"], value_set=pa.array(gone, pa.string())))
        )
        held_out = good.filter(pc.equal(good["split"], "held_out"))
        _FOUND[key] = [
            {
                "place": place,
                "kind": section.kind,
                "problem": doubt.problem,
                "remedy": doubt.remedy,
                "severe": doubt.severe,
            }
            for name, scorer in scorers.items()
            for place, section, doubt in reward_doubts(
                scorer, _ground_truths(good if name == "reward" else held_out), name
            )
        ]
    return _FOUND[key]


def refuse(experiment: Experiment, found: Sequence[Mapping[str, Any]]) -> None:
    """Raise one ConfigError for the severe problems of scorers with `trust: refuse`; warn of the others."""
    sections = {
        place: section
        for name, scorer in _scorers(experiment).items()
        for place, section in terms(scorer, name)
    }
    refused = [doubt for doubt in found if doubt["severe"] and sections[doubt["place"]].trust == "refuse"]
    for doubt in found:
        if doubt not in refused:
            warnings.warn(f"{in_words(doubt)}; {doubt['remedy']}", stacklevel=2)
    if refused:
        remedies = dict.fromkeys(str(doubt["remedy"]) for doubt in refused)
        raise ConfigError(
            f"the reward cannot be trusted: {'; '.join(map(in_words, refused))}",
            remedy=f"{'; '.join(remedies)}; trust: warn there goes on with it as it is",
        )


def in_words(doubt: Mapping[str, Any]) -> str:
    """The scorer and its problem in one line."""
    return f"{doubt['kind']} [{doubt['place']}]: {doubt['problem']}"


def _scorers(experiment: Experiment) -> dict[str, RewardConfig]:
    judges = experiment.evaluation.judges.items()
    return {"reward": experiment.reward} | {f"evaluation.judges.{name}": judge for name, judge in judges}


def _ground_truths(prompts: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(prompts["source"].to_pylist(), prompts["ground_truth"].to_pylist(), strict=True))
