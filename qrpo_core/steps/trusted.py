"""Whether an experiment's rewards are to be trusted: tried once on a few prompts, and remembered.

What `rewards.trust` finds is kept in the facts of the `usable` artifact, whatever `reward.trust` says; that
decides at every start whether a run ends, or goes on with a headline.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.errors import ConfigError
from qrpo_core.ids import digest_json
from qrpo_core.rewards.registry import reward_doubts, reward_identity
from qrpo_core.rewards.trust import terms

#: What this process has found, by what it was found of: preflight looks, then the run does.
_FOUND: dict[str, list[dict[str, Any]]] = {}


def doubts(
    experiment: Experiment, prompts: pa.Table, left_out: Iterable[str | None], asked: str
) -> list[dict[str, Any]]:
    """Every doubt about the reward, tried on all prompts, and about each judge, tried on held-out ones.

    left_out : ids of prompts that are no use. asked : the key of the prompts' recipe.
    Returns the place of the scorer in the experiment, its kind, and what `rewards.trust.Doubt` holds;
    JSON-ready.
    """
    gone = sorted({each for each in left_out if each is not None})
    scorers = _scorers(experiment)
    identities = {name: reward_identity(scorer) for name, scorer in scorers.items()}
    key = digest_json({"prompts": asked, "left_out": gone, "scorers": identities})
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
                scorer, _references(good if name == "reward" else held_out), name
            )
        ]
    return _FOUND[key]


def refuse(experiment: Experiment, found: Sequence[Mapping[str, Any]]) -> None:
    """Raise one ConfigError for the severe doubts of scorers with `trust: refuse`; warn of the others."""
    sections = {
        place: section
        for name, scorer in _scorers(experiment).items()
        for place, section in terms(scorer, name)
    }
    refused = [doubt for doubt in found if doubt["severe"] and sections[doubt["place"]].trust == "refuse"]
    for doubt in found:
        if doubt not in refused:
            warnings.warn(f"{said(doubt)}; {doubt['remedy']}", stacklevel=2)
    if refused:
        remedies = dict.fromkeys(str(doubt["remedy"]) for doubt in refused)
        raise ConfigError(
            f"the reward is not to be trusted: {'; '.join(map(said, refused))}",
            remedy=f"{'; '.join(remedies)}; trust: warn there goes on with it as it is",
        )


def said(doubt: Mapping[str, Any]) -> str:
    """Which scorer is doubted, and why."""
    return f"{doubt['kind']} [{doubt['place']}]: {doubt['problem']}"


def _scorers(experiment: Experiment) -> dict[str, RewardConfig]:
    judges = experiment.evaluation.judges.items()
    return {"reward": experiment.reward} | {f"evaluation.judges.{name}": judge for name, judge in judges}


def _references(prompts: pa.Table) -> list[tuple[str, str | None]]:
    return list(zip(prompts["source"].to_pylist(), prompts["reference"].to_pylist(), strict=True))
