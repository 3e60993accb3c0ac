"""An experiment beside its store: what every step works with."""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qrpo_core.common.schemas import check_table
from qrpo_core.common.thinking_marks import MARKS
from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.config.rewards import has_kind, marks_of
from qrpo_core.engines.kinds import EngineKind, EngineRequest
from qrpo_core.models.template_clock import today
from qrpo_core.pipeline.input_files import by_content, located
from qrpo_core.store.artifacts import ArtifactStore
from qrpo_core.store.backends.opening import open_objects
from qrpo_core.store.blocks.block_store import BlockStore
from qrpo_core.store.blocks.tables import from_parquet, to_parquet
from qrpo_core.store.manifest import Manifest
from qrpo_core.store.recipe import Recipe

if TYPE_CHECKING:
    from qrpo_core.engines.base import Engine
    from qrpo_core.models.chat import Chat
    from qrpo_core.rewards.base import Reward

#: The content of an artifact before it is committed: files (name → local path or bytes) and facts.
Built = tuple[Mapping[str, Path | bytes], dict[str, Any]]


def as_parquet(table: pa.Table, schema: pa.Schema, where: str) -> bytes:
    """The table as a Parquet file, checked against its schema."""
    return to_parquet(check_table(table, schema, where))


@dataclass
class _Loaded:
    """The engine and the scorer in memory, each with what it was asked for by."""

    engine: tuple[tuple[Any, ...], Engine] | None = None
    reward: tuple[RewardConfig, Reward] | None = None


class Workspace:
    """One experiment, its store, and the loaded things that steps share (one engine at a time)."""

    def __init__(self, experiment: Experiment) -> None:
        self.objects = open_objects(experiment.store)
        #: The experiment as other machines get it, with the addresses of its files in the store.
        self.given = experiment
        self.experiment = located(experiment, self.objects)
        self._files = by_content(experiment)  # before the run: they may be edited meanwhile
        self.artifacts = ArtifactStore(self.objects, experiment.store.verify)
        self.blocks = BlockStore(self.objects, experiment.store)
        #: Rows of the reward trial, by recipe, for their own stage to count.
        self.trial_rows: Counter[str] = Counter()
        #: The day that chat templates take for today; `pipeline.prompts` sets it to the prompts artifact's.
        self.day = experiment.prompts.date or today()
        self._chats: dict[tuple[Path, str], Chat] = {}
        self._loaded = _Loaded()
        self._benchmarks: dict[str, Workspace] = {}

    @property
    def settings_facts(self) -> dict[str, Any]:
        """What the artifacts of a run keep of its settings, for the ledger."""
        return {"experiment": self.given.model_dump(mode="json"), "files": self._files}

    def benchmark(self, name: str) -> Workspace:
        """The workspace of a benchmark's rows, made once: the same store, engine and scorer in memory."""
        if name not in self._benchmarks:
            other = copy.copy(self)
            other.given = self.given.of_benchmark(name)
            other.experiment = self.experiment.of_benchmark(name)
            other.day = other.experiment.prompts.date or today()
            other._chats, other._benchmarks = {}, {}
            self._benchmarks[name] = other
        return self._benchmarks[name]

    def beside(self, experiment: Experiment) -> Workspace:
        """A workspace of an experiment that differs in its training alone.

        The two share the store with what is known of it, tokenizers and the day; not engines and rewards.
        """
        other = copy.copy(self)
        other.given, other.experiment = experiment, located(experiment, self.objects)
        other._files = by_content(experiment)
        other._loaded, other._benchmarks = _Loaded(), {}
        return other

    def make(self, recipe: Recipe, build: Callable[[Path], Built]) -> Manifest:
        """The artifact of a recipe: what the store has, else what `build` makes in a scratch directory."""
        found = self.artifacts.find(recipe)
        if found is not None:
            return found
        with tempfile.TemporaryDirectory(prefix=f"qrpo-{recipe.step}-") as scratch:
            started = time.monotonic()
            files, facts = build(Path(scratch))
            return self.artifacts.commit(recipe, files, facts, time.monotonic() - started)

    def load(self, manifest: Manifest, name: str, schema: pa.Schema) -> pa.Table:
        """One table of an artifact, its content and schema checked."""
        data = self.artifacts.read(manifest, name)
        return check_table(from_parquet(data), schema, manifest.path(name))

    def chat(self, directory: Path) -> Chat:
        """The tokenizer and chat template of a policy's directory on the day of the prompts, loaded once."""
        from qrpo_core.models.chat import Chat

        wanted = (directory, self.day)
        if wanted not in self._chats:
            variables = self.experiment.model.chat_template_kwargs
            self._chats[wanted] = Chat.load(
                directory, day=self.day, variables=variables, marks=self.thinking_marks
            )
        return self._chats[wanted]

    @property
    def thinking_marks(self) -> frozenset[str]:
        """The marks of thinking that texts of completions keep: those known, and those that scorers name."""
        scorers = (self.experiment.reward, *self.experiment.evaluation.judges.values())
        return MARKS.union(*map(marks_of, scorers))

    def engine(
        self, directory: Path, *, kind: EngineKind, precision: str | None = None, adapters: Path | None = None
    ) -> Engine:
        """The engine for a policy's directory. Asking for another one closes the one before."""
        wanted = (directory, kind, precision, adapters)
        if self._loaded.engine is None or self._loaded.engine[0] != wanted:
            self.close()
            asked = EngineRequest(self.experiment, directory, self.chat(directory), precision, adapters)
            self._loaded.engine = (wanted, kind.make(asked))
        return self._loaded.engine[1]

    def reward(self, scorer: RewardConfig | None = None) -> Reward:
        """A scorer (None: the experiment's). Asking for another one closes the one before.

        One that loads a model of its own closes the engine as well: they would share the device's memory.
        """
        from qrpo_core.rewards.registry import make_reward

        wanted = self.dated(scorer or self.experiment.reward)
        if self._loaded.reward is None or self._loaded.reward[0] != wanted:
            self._close_reward()
            if has_kind(wanted, "model"):
                self.close()
            self._loaded.reward = (wanted, make_reward(wanted))
        return self._loaded.reward[1]

    def dated(self, scorer: RewardConfig) -> RewardConfig:
        """The scorer with the day of the prompts, where a chat template in it asks for the time."""
        from qrpo_core.rewards.model.source import dated

        return dated(scorer, self.day)

    def close(self) -> None:
        """Give back the memory of the engine and of the reward."""
        self._close_reward()
        if self._loaded.engine is not None:
            self._loaded.engine[1].close()
            self._loaded.engine = None

    def _close_reward(self) -> None:
        if self._loaded.reward is not None:
            self._loaded.reward[1].close()
            self._loaded.reward = None
