"""An experiment beside its store: what every step works with."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrpo_core.config import Experiment, RewardConfig
from qrpo_core.rewards.config import has_kind, marks_of
from qrpo_core.store.artifacts import Artifacts, Manifest
from qrpo_core.store.blocks import Blocks
from qrpo_core.store.objects import open_objects
from qrpo_core.store.recipe import Recipe
from qrpo_core.template_clock import today
from qrpo_core.thinking_marks import MARKS

if TYPE_CHECKING:
    from qrpo_core.data.chat import Chat
    from qrpo_core.engines.base import Engine
    from qrpo_core.rewards.base import Reward

#: What a step hands over to be committed: files (name → local path or bytes) and facts to remember.
Built = tuple[Mapping[str, Path | bytes], dict[str, Any]]


class Workspace:
    """One experiment, its store, and the loaded things that steps share (one engine at a time)."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.objects = open_objects(experiment.store)
        self.artifacts = Artifacts(self.objects, experiment.store.verify)
        self.blocks = Blocks(self.objects, experiment.store)
        #: Rows by recipe key that this process computed before the stage that they belong to.
        self.ahead: Counter[str] = Counter()
        #: The day that chat templates take for today; `steps.prompts` sets it to the prompts artifact's.
        self.day = experiment.prompts.date or today()
        self._chats: dict[tuple[Path, str], Chat] = {}
        self._engine: tuple[tuple[Any, ...], Engine] | None = None
        self._reward: tuple[RewardConfig, Reward] | None = None

    def make(self, recipe: Recipe, build: Callable[[Path], Built]) -> Manifest:
        """The artifact of a recipe: what the store has, else what `build` makes in a scratch directory."""
        found = self.artifacts.find(recipe)
        if found is not None:
            return found
        with tempfile.TemporaryDirectory(prefix=f"qrpo-{recipe.step}-") as scratch:
            started = time.monotonic()
            files, facts = build(Path(scratch))
            return self.artifacts.commit(recipe, files, facts, time.monotonic() - started)

    def chat(self, directory: Path) -> Chat:
        """The tokenizer and chat template of a policy's directory on the day of the prompts, loaded once."""
        from qrpo_core.data.chat import Chat

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
        self, directory: Path, *, kind: str, precision: str | None = None, adapters: Path | None = None
    ) -> Engine:
        """The engine for a policy's directory. Asking for another one closes the one before."""
        from qrpo_core.engines.registry import make_engine

        wanted = (directory, kind, precision, adapters)
        if self._engine is None or self._engine[0] != wanted:
            self.close()
            engine = make_engine(
                kind,
                directory,
                dtype=self.experiment.model.dtype,
                batch_size=self.experiment.sampling.batch_size,
                batch_tokens=self.experiment.sampling.batch_tokens,
                chat=self.chat(directory),
                precision=precision,
                vllm=self.experiment.vllm,
                endpoint=self.experiment.endpoint,
                fake=self.experiment.fake,
                adapters=adapters,
            )
            self._engine = (wanted, engine)
        return self._engine[1]

    def reward(self, scorer: RewardConfig | None = None) -> Reward:
        """A scorer (None: the experiment's). Asking for another one closes the one before.

        One that loads a model of its own closes the engine as well: they would share the device's memory.
        """
        from qrpo_core.rewards.registry import make_reward

        wanted = self.dated(scorer or self.experiment.reward)
        if self._reward is None or self._reward[0] != wanted:
            self._close_reward()
            if has_kind(wanted, "model"):
                self.close()
            self._reward = (wanted, make_reward(wanted))
        return self._reward[1]

    def dated(self, scorer: RewardConfig) -> RewardConfig:
        """The scorer with the day of the prompts, where a chat template in it asks for the time."""
        from qrpo_core.rewards.model_source import dated

        return dated(scorer, self.day)

    def close(self) -> None:
        """Give back the memory of the engine and of the reward."""
        self._close_reward()
        if self._engine is not None:
            self._engine[1].close()
            self._engine = None

    def _close_reward(self) -> None:
        if self._reward is not None:
            self._reward[1].close()
            self._reward = None
