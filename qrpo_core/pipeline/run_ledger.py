"""The ledger of a store's runs, read from the manifests of their policies, evaluations and reports.

Nothing else is kept: a run is in the ledger as long as its policy is in the store, whoever started it and
from whatever file or form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ConfigError, MissingError
from qrpo_core.common.hashing import digest_json
from qrpo_core.config import Experiment, StoreConfig
from qrpo_core.config.reading import apply_override, parse_experiment
from qrpo_core.config.section import flat
from qrpo_core.evaluation.results import EvaluationResult
from qrpo_core.pipeline import policies
from qrpo_core.pipeline.evaluation import result_of
from qrpo_core.store.artifacts import ArtifactStore
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.manifest import Manifest

#: A name of a run: its number, or the beginning of a digest.
_NAME = re.compile(r"[0-9]{1,5}|[0-9a-f]{6,32}")

#: Sections of an experiment that say where and how it ran, and the name that a run is shown with.
_NOT_SETTINGS = ("name", "store", "service")


@dataclass(frozen=True)
class StoredRun:
    """A trained policy with one evaluation of it.

    number : its place among the runs of the store by date, from 1. policy : digest of the policy.
    evaluated : None where the policy was not evaluated. reports : of this evaluation, the newest first.
    """

    number: int
    policy: str | None
    train: Manifest
    evaluated: Manifest | None
    reports: tuple[Manifest, ...]

    @cached_property
    def digest(self) -> str:
        """The name that stays when numbers change: 32 hex characters."""
        return digest_json([self.train.key, "" if self.evaluated is None else self.evaluated.key])

    @property
    def date(self) -> str:
        """When its result was made, ISO 8601 in UTC."""
        return (self.evaluated or self.train).created

    @property
    def minute(self) -> str:
        """The date to the minute, for people."""
        return self.date[:16].replace("T", " ")

    @property
    def artifacts(self) -> tuple[Manifest, ...]:
        """Its reports, the newest first, its evaluation and its policy."""
        return (*self.reports, *(() if self.evaluated is None else (self.evaluated,)), self.train)

    @property
    def report(self) -> Manifest | None:
        """The newest report."""
        return self.reports[0] if self.reports else None

    @property
    def experiment(self) -> dict[str, Any] | None:
        """Every setting, as a mapping; None for a run of a version that kept none."""
        return self._kept.get("experiment")

    @property
    def _kept(self) -> Mapping[str, Any]:
        """The facts of its newest artifact that has the experiment among them."""
        return next((each.facts for each in self.artifacts if "experiment" in each.facts), {})

    @property
    def name(self) -> str:
        """The name of its experiment; "" where it is not known."""
        named = self.experiment or (self.reports[0].recipe["config"] if self.reports else {})
        return str(named.get("name", ""))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its settings by dotted name, files by their content, and the first digits of what it was made from.

        Of a run of a version that kept no experiment: those of its objective and training.
        """
        config, inputs = self.train.recipe["config"], self.train.recipe["inputs"]
        kept = self.experiment or {name: config[name] for name in ("objective", "training")}
        found = flat({name: value for name, value in kept.items() if name not in _NOT_SETTINGS})
        found |= self._kept.get("files", {})
        found["start"] = inputs["policy"][:8]
        if self.evaluated is not None:
            found["prompts"] = self.evaluated.recipe["inputs"]["prompts"][:8]
        return found | {"training set": inputs["training_set"][:8]}

    @cached_property
    def result(self) -> EvaluationResult | None:
        """The evaluation's result; None without one. Raises DataError for one of another version."""
        return None if self.evaluated is None else result_of(self.evaluated)

    def answers_to(self, name: str) -> bool:
        """Whether a digest of the run or of one of its artifacts begins with `name`."""
        digests = (self.digest, self.policy or "", *(each.key for each in self.artifacts))
        return any(each.startswith(name) for each in digests)


class RunLedger:
    """The runs of one store. Writes nothing.

    damaged : keys of the unreadable manifests that were met; their runs are not known.
    """

    def __init__(self, store: StoreConfig) -> None:
        self.store = store
        self.objects = open_objects(store)
        self.artifacts = ArtifactStore(self.objects, store.verify)
        self.damaged: set[str] = set()

    @cached_property
    def runs(self) -> list[StoredRun]:
        """Every run, the oldest first, as they are when they are first asked for."""
        return self.read_runs()

    def read_runs(self) -> list[StoredRun]:
        """Every run as they are now, the oldest first."""
        evaluations: dict[str, list[Manifest]] = {}
        for manifest in self._manifests("evaluate"):
            evaluations.setdefault(self._policy_of(manifest), []).append(manifest)
        reports: dict[tuple[str, str], list[Manifest]] = {}
        for manifest in self._manifests("report"):
            inputs = manifest.recipe["inputs"]
            reports.setdefault((inputs["train"], inputs["evaluate"]), []).append(manifest)
        found = []
        for train in self._manifests("train"):
            policy = policies.digest_of(train.files)
            of_policy: Sequence[Manifest | None] = evaluations.get(policy or "") or [None]
            for evaluated in of_policy:
                key = "" if evaluated is None else evaluated.key
                shown = reports.get((train.key, key), ())
                of_both = sorted(shown, key=lambda each: each.created, reverse=True)
                found.append((policy, train, evaluated, tuple(of_both)))
        found.sort(key=lambda each: ((each[2] or each[1]).created, each[1].key))
        return [StoredRun(number, *each) for number, each in enumerate(found, 1)]

    def _manifests(self, step: str) -> Iterator[Manifest]:
        """The readable manifests of a step; one that is damaged does not hide the others."""
        for check in self.artifacts.check_manifests(step):
            if isinstance(check.manifest, Manifest):
                yield check.manifest
            else:
                self.damaged.add(check.key)

    def comparisons(self) -> list[Manifest]:
        """The comparisons of variants as they are now, the newest first."""
        return sorted(self._manifests("compare"), key=lambda each: each.created, reverse=True)

    def find(self, name: str) -> StoredRun:
        """The run with this number or beginning of a digest; ConfigError where there is not exactly one."""
        runs = self.runs
        if name.isdigit() and 1 <= int(name) <= len(runs):
            return runs[int(name) - 1]
        found = [each for each in runs if len(name) >= 6 and each.answers_to(name)]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(f"{each.digest[:8]} (run {each.number})" for each in found)
            raise ConfigError(f"{len(found)} runs answer to {name!r}", remedy=f"name one of {several}")
        there = f"it has runs 1 to {len(runs)}" if runs else "it has no run"
        raise ConfigError(
            f"no run {name!r}: {there}",
            where=f"store {self.objects.url}",
            remedy="qrpo runs lists them; --store names another store",
        )

    def experiment_of(self, name: str, overrides: Iterable[str] = ()) -> Experiment:
        """The experiment of a run on this store, with `a.b=value` overrides. Raises ConfigError."""
        run = self.find(name)
        if run.experiment is None:
            raise ConfigError(
                f"run {run.number} was made by qrpo {run.train.code}, which kept no settings with it",
                where=f"store {self.objects.url}",
                remedy="give its YAML file",
            )
        data: dict[str, Any] = {**run.experiment, "store": self.store.model_dump(mode="json")}
        for override in overrides:
            apply_override(data, override)
        return parse_experiment(data, where=f"run {run.number} of {self.objects.url}")

    def report_path(self, run: StoredRun) -> Path:
        """A local path of the run's report, downloaded once from a remote store; MissingError without one."""
        if run.report is None:
            raise MissingError(
                f"run {run.number} has no report",
                where=f"store {self.objects.url}",
                remedy=f"qrpo run {run.digest[:8]} evaluates it and writes one",
            )
        return self.artifacts.file(run.report, "report.html")

    def place(self, manifest: Manifest, name: str) -> str:
        """The address of a file or folder of an artifact."""
        return f"{self.objects.url}/artifacts/{manifest.step}/{manifest.key}/{manifest.folder}/{name}"

    def _policy_of(self, evaluated: Manifest) -> str:
        """The digest of the policy that was evaluated; "" where it is not known."""
        if (named := evaluated.facts.get("policy")) is not None:
            return str(named)
        return self._scored.get(evaluated.recipe["inputs"]["policy_logprobs"], "")

    @cached_property
    def _scored(self) -> Mapping[str, str]:
        """The policy of each recipe of rows: older evaluations name theirs by its log-probs alone."""
        blocks = BlockStore(self.objects, self.store)
        return {each.key: each.inputs.get("policy", "") for each in blocks.all_recipes()}


def names_a_run(text: str) -> bool:
    """Whether `text` can only be a run: a number or hex digits, and no file of that name."""
    return _NAME.fullmatch(text) is not None and not Path(text).exists()
