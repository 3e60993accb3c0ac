"""One experiment: frozen models, unknown keys refused with the nearest known name.

A field lives in the section of the step whose result it changes. A field marked `Speed` changes how
fast a result comes, not the result: it stays out of every recipe (see `recipe_fields`).
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from qrpo_core.errors import ConfigError

#: Marks a field that changes speed, place or presentation, never a result.
Speed: JsonDict = {"recipe": False}

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Base of every section: frozen, closed to unknown keys, defaults checked like given values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelConfig(Section):
    """The reference policy: the model that training starts from."""

    path: str = Field(
        title="Model",
        description="A directory, a hub id, a .gguf file, or package:NAME/FILE.gguf for a file inside an "
        "installed Python package.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Precision of the weights, as stored and as sampled from."
    )


class PromptsConfig(Section):
    """Where prompts come from, and which are held out."""

    kind: Literal["template", "reasoning_gym", "file", "hub"] = Field(title="Source")
    held_out: Share = Field(
        0.2, description="Share of prompts kept for evaluation; decided by prompt_id, never by row order."
    )
    system: str | None = Field(None, description="System turn put before prompts that have none.")
    limit: PositiveInt | None = Field(None, description="Take at most this many prompts, in source order.")
    # kind: template
    templates: tuple[str, ...] = Field((), description="template: sentences with {slots}.")
    words: dict[str, tuple[str, ...]] = Field({}, description="template: the words of each slot.")
    # kind: reasoning_gym
    task: str | None = Field(None, description="reasoning_gym: name of the task.")
    parameters: dict[str, Any] = Field({}, description="reasoning_gym: parameters of the task.")
    # kinds template and reasoning_gym
    size: PositiveInt | None = Field(None, description="template, reasoning_gym: number of prompts.")
    seed: int = Field(0, description="template, reasoning_gym: seed of the draw.")
    # kinds file and hub
    path: str | None = Field(None, description="file: JSONL or Parquet, local or s3://.")
    name: str | None = Field(None, description="hub: data set name (or a local data set directory).")
    revision: str | None = Field(None, description="hub: revision of the data set.")
    split: str = Field("train", description="hub: which split to read.")
    prompt_field: str = Field("prompt", description="file, hub: a string or a list of messages.")
    reference_field: str | None = Field(None, description="file, hub: what the reward checks against.")
    chosen_field: str | None = Field(None, description="file, hub: preferred completion or conversation.")
    rejected_field: str | None = Field(None, description="file, hub: other completion or conversation.")

    @model_validator(mode="after")
    def _needs(self) -> PromptsConfig:
        needed = {
            "template": ("templates", "size"),
            "reasoning_gym": ("task", "size"),
            "file": ("path",),
            "hub": ("name",),
        }[self.kind]
        for field in needed:
            if not getattr(self, field):
                raise ValueError(f"prompts.{field} is missing; kind {self.kind!r} needs it")
        for field in sorted(_changed(self) - _prompt_fields(self.kind)):
            raise ValueError(f"prompts.{field} does not belong to kind {self.kind!r}; remove it")
        if (self.chosen_field is None) != (self.rejected_field is None):
            raise ValueError("prompts.chosen_field and prompts.rejected_field come together")
        return self


def _changed(section: Section) -> set[str]:
    """Fields that differ from their defaults (a form or a JSON round trip gives every field)."""
    fields = type(section).model_fields.items()
    return {name for name, field in fields if getattr(section, name) != field.get_default()}


def _prompt_fields(kind: str) -> set[str]:
    drawn = {"size", "seed"}
    read = {"split", "prompt_field", "reference_field", "chosen_field", "rejected_field"}
    own = {
        "template": {"templates", "words"} | drawn,
        "reasoning_gym": {"task", "parameters"} | drawn,
        "file": {"path"} | (read - {"split"}),
        "hub": {"name", "revision"} | read,
    }[kind]
    return own | {"kind", "held_out", "system", "limit"}


class SamplingConfig(Section):
    """How reference completions are drawn from the policy."""

    references_per_prompt: PositiveInt = Field(
        8,
        description="The pre-computation budget: reference completions of every training prompt.",
        json_schema_extra=Speed,
    )
    temperature: PositiveFloat = Field(1.0, description="1 samples from the policy itself.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="1 keeps the whole distribution.")
    max_new_tokens: PositiveInt = Field(64, description="Length limit; a completion cut by it is marked.")
    seed: int = Field(0, description="With prompt_id and sample_index it gives every sample its own seed.")
    engine: Literal["transformers", "fake"] = Field(
        "transformers", description="Which engine draws. Recorded with every row.", json_schema_extra=Speed
    )
    batch_size: PositiveInt = Field(32, description="Sequences at a time.", json_schema_extra=Speed)


class RewardConfig(Section):
    """What a completion is worth: one scorer, or a weighted sum of others."""

    kind: Literal["number", "exact", "reasoning_gym", "math", "sentiment", "length", "weighted"] = Field(
        title="Scorer"
    )
    extract: Literal["whole", "last_line", "last_number", "last_integer", "answer_tag"] | None = Field(
        None, description="exact, number, reasoning_gym: which part of the completion is the answer."
    )
    tolerance: NonNegativeFloat = Field(
        1e-6, description="number: largest absolute difference that is equal."
    )
    min_words: Annotated[int, Field(ge=0)] = Field(0, description="length: fewest words.")
    max_words: PositiveInt | None = Field(None, description="length: most words.")
    terms: tuple[WeightedTerm, ...] = Field((), description="weighted: the scorers and their weights.")

    @model_validator(mode="after")
    def _needs(self) -> RewardConfig:
        own = {
            "number": {"extract", "tolerance"},
            "exact": {"extract"},
            "reasoning_gym": {"extract"},
            "length": {"min_words", "max_words"},
            "weighted": {"terms"},
        }.get(self.kind, set())
        for field in sorted(_changed(self) - own - {"kind"}):
            raise ValueError(f"reward.{field} does not belong to kind {self.kind!r}; remove it")
        if self.kind == "weighted" and not self.terms:
            raise ValueError("reward.terms is empty; kind 'weighted' needs at least one term")
        if self.kind == "length" and self.max_words is None:
            raise ValueError("reward.max_words is missing; kind 'length' needs it")
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"reward.max_words {self.max_words} is below reward.min_words {self.min_words}")
        return self


class WeightedTerm(Section):
    """One scorer of a weighted sum."""

    weight: Annotated[float, Field(allow_inf_nan=False)]
    reward: RewardConfig


class ObjectiveConfig(Section):
    """The regression: which reward is fitted, and how strongly the reference holds."""

    beta: PositiveFloat = Field(0.1, description="KL strength; targets are f(R_q) - beta log Z.")
    transform: Literal["identity", "log", "square", "sqrt", "normal"] = Field(
        "identity", description="f, applied to the quantile reward."
    )
    loss: Literal["mse", "mae"] = Field("mse", description="Squared or absolute residual.")
    convention: Literal["weak", "mid", "strict", "randomized"] = Field(
        "weak", description="How ties count in the quantile; weak is P(R' <= R), the paper's."
    )
    normaliser: Literal["auto", "population", "finite", "empirical"] = Field(
        "auto", description="Which log Z; auto takes empirical where rewards tie and population otherwise."
    )


class TrainingConfig(Section):
    """The optimisation of the policy on the stored targets."""

    learning_rate: PositiveFloat = Field(1e-6)
    epochs: PositiveFloat = Field(1.0)
    batch_size: PositiveInt = Field(128, description="Completions an optimiser step.")
    micro_batch_size: PositiveInt = Field(
        8,
        description="Completions a forward pass; the rest of a batch is accumulated.",
        json_schema_extra=Speed,
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.1)
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field("cosine")
    weight_decay: NonNegativeFloat = Field(0.0)
    max_grad_norm: NonNegativeFloat = Field(0.0, description="0 clips nothing, as published.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: float32 weights under bfloat16 autocast. Reference log-probs use it too."
    )
    gradient_checkpointing: bool = Field(False, json_schema_extra=Speed)
    seed: int = Field(0)

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        if self.batch_size % min(self.micro_batch_size, self.batch_size):
            raise ValueError(
                f"training.micro_batch_size {self.micro_batch_size} does not divide "
                f"training.batch_size {self.batch_size}"
            )
        return self


class EvaluationConfig(Section):
    """Held-out comparison of the trained policy with the reference."""

    samples_per_prompt: PositiveInt = Field(
        4, description="Completions of every held-out prompt, each policy."
    )
    confidence: Share = Field(0.95, description="Level of the bootstrap intervals.")
    resamples: Annotated[int, Field(ge=100)] = Field(10_000, description="Bootstrap resamples of prompts.")
    seed: int = Field(0)


class StoreConfig(Section):
    """Where artifacts live. Credentials come from the environment or the usual AWS files, never from here."""

    path: str = Field(".qrpo", description="A local directory or s3://bucket/prefix.")
    endpoint_url: str | None = Field(None, description="s3: endpoint of a server other than AWS.")
    region: str | None = Field(None, description="s3: region.")
    path_style: bool = Field(False, description="s3: bucket in the path instead of the host name.")
    rows_per_block: PositiveInt = Field(256, description="Rows of a block: what an interruption can cost.")


class Experiment(Section):
    """One YAML file: everything that decides what a run computes."""

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", json_schema_extra=Speed)
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    reward: RewardConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    store: StoreConfig = StoreConfig()


def recipe_fields(section: Section) -> dict[str, Any]:
    """The fields of a section that belong in a recipe: all but those marked `Speed`, defaults included.

    Returns JSON-ready values; None is kept, so a new field with a None default is a visible change.
    """
    kept = {name for name, field in type(section).model_fields.items() if not _is_speed(field)}
    return section.model_dump(mode="json", include=kept)


def _is_speed(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and extra.get("recipe") is False


def load_experiment(path: Path | str, overrides: list[str] | None = None) -> Experiment:
    """Read one experiment and apply `a.b=value` overrides (values are YAML).

    Raises ConfigError with the file, the key and the remedy; nothing is guessed.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no experiment file {str(path)!r}", remedy="give the path of a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read experiment {str(path)!r}: {error}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {error}", where=str(path), remedy="mend the syntax") from None
    if not isinstance(data, dict):
        raise ConfigError(
            "an experiment is a mapping of sections", where=str(path), remedy="see experiments/demo.yaml"
        )
    data.setdefault("name", file.stem)
    for override in overrides or []:
        _apply_override(data, override)
    return parse_experiment(data, where=str(path))


def parse_experiment(data: dict[str, Any], where: str = "experiment") -> Experiment:
    """Validate a mapping; the first problem becomes one ConfigError line."""
    try:
        # Strict JSON-like reading would refuse YAML lists for tuples, so plain python mode is used.
        return Experiment.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"cannot read --set {override!r}", remedy="write it as section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of --set {override!r} is not YAML", remedy="quote it") from None
    if isinstance(value, str):
        value = _number(value)
    place = data
    for part in parts[:-1]:
        below = place.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(
                f"--set {override!r}: {part!r} is a value, not a section", remedy="see qrpo config"
            )
        place = below
    place[parts[-1]] = value


def _number(text: str) -> Any:
    """YAML 1.1 reads 3e-5 as a string (no dot); a command line means the number."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts) or "experiment"
    if first["type"] == "extra_forbidden":
        known = _known_names(parts[:-1])
        near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return ConfigError(f"unknown key {key!r}", where=where, remedy=remedy)
    if first["type"] == "missing":
        return ConfigError(
            f"{key!r} is missing", where=where, remedy="add it; qrpo config --schema lists the fields"
        )
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return ConfigError(message, where=where)
    return ConfigError(f"{key} = {first['input']!r} is refused", where=where, remedy=message)


def _known_names(path: list[str]) -> list[str]:
    model: Any = Experiment
    for part in path:
        if part == "terms" or part.isdigit():
            model = WeightedTerm
            continue
        field = model.model_fields.get(part)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        ):
            return []
        model = field.annotation
    return list(model.model_fields)
