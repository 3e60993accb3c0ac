"""Find, check and identify the classifier of `reward.model` without reading its weights.

It reads JSON files only: it imports neither torch nor transformers and runs no code of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ConfigError, ModelError
from qrpo_core.common.hashing import digest_file, digest_json
from qrpo_core.config import ModelConfig
from qrpo_core.config.rewards import ModelRewardConfig, RewardConfig
from qrpo_core.models.source import PACKAGE_PREFIX, ModelSource, resolve_model

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Files in which a model names its own code, and the classes that are loaded here.
_CODE_ENTRIES = {
    "config.json": ("AutoConfig", "AutoModelForSequenceClassification"),
    "tokenizer_config.json": ("AutoTokenizer",),
}
#: transformers' default without labels in config.json.
_DEFAULT_LABELS = 2


def locate(config: ModelRewardConfig) -> ModelSource:
    """Return the source of a reward model, after all checks that its JSON files allow.

    The small files of a hub model are downloaded if they are not cached; its weights are not.

    Raises
    ------
    ConfigError : the model has its own code without trust, or trust in a hub id that is not pinned to a
        commit (before any download); it is not a sequence classifier; it has several outputs and no `label`,
        or an unknown `label`; `max_length` is above the model's own.
    ModelError : config, weights, tokenizer or chat template are missing.
    """
    _check_pinned(config)
    try:
        source = resolve_model(ModelConfig(path=config.path, revision=config.revision, dtype=config.dtype))
        folder = source.directory if source.kind == "directory" else _small_files(config, source)
    except ModelError as error:
        where = error.where if error.where not in (None, "model.path") else f"reward.model.path {config.path}"
        message = re.sub(r"\bmodel\.path\b", "reward.model.path", error.message)
        raise ModelError(message, where=where, remedy=error.remedy) from None
    settings = _json(folder / "config.json")
    if not _check_code(config, folder):
        _check_head(config, settings)
    own = settings.get("max_position_embeddings")
    if config.max_length is not None and isinstance(own, int) and config.max_length > own:
        raise ConfigError(
            f"reward.model.max_length {config.max_length} is above the model's {own} positions",
            where=config.path,
            remedy=f"lower it to {own} or less, or leave it out",
        )
    return source


def model_identity(config: ModelRewardConfig) -> dict[str, str]:
    """Return the identity of a model for a recipe: digests of a directory's content, or a hub model's commit.

    It covers the code in the folders of a trusted directory too. Raises what `locate` raises.
    """
    source = locate(config)
    identity = dict(source.identity)
    if config.trust_remote_code and source.kind == "directory":
        root = Path(source.location)
        files = sorted(root.rglob("*.py"))
        identity["code"] = digest_json({str(file.relative_to(root)): digest_file(file) for file in files})
    return identity


def dated(config: RewardConfig, day: str) -> RewardConfig:
    """Return the reward with `day` as the date of every model whose template asks for one and has none."""
    if config.model is not None and config.model.date is None and locate(config.model).reads_clock:
        return config.model_copy(update={"model": config.model.model_copy(update={"date": day})})
    if config.terms:
        terms = [t.model_copy(update={"reward": dated(t.reward, day)}) for t in config.terms]
        return config.model_copy(update={"terms": tuple(terms)})
    return config


def _check_pinned(config: ModelRewardConfig) -> None:
    if config.path.startswith(PACKAGE_PREFIX) or config.path.endswith(".gguf"):
        raise ConfigError(
            f"reward.model.path {config.path!r} is a GGUF file, which holds no classifier",
            remedy="give a directory or a hub id of a sequence classifier",
        )
    local = Path(config.path).expanduser().exists()
    if config.trust_remote_code and not local and not _COMMIT.fullmatch(config.revision or ""):
        raise ConfigError(
            f"reward.model.trust_remote_code with revision {config.revision!r}",
            where=f"reward.model.path {config.path}",
            remedy="read the code, and set reward.model.revision to the commit that you read "
            "(40 hexadecimal characters): a branch or tag may change to other code",
        )


def _check_code(config: ModelRewardConfig, folder: Path) -> bool:
    """Return whether the model has its own code. Raises ConfigError without trust, or for code elsewhere."""
    entries = list(_code_entries(folder))
    for name, entry in entries:
        if not config.trust_remote_code:
            raise ConfigError(
                f"the model brings code of its own ({entry} in {name})",
                where=f"reward.model.path {config.path}",
                remedy="read that code; to run it set reward.model.trust_remote_code: true and, for a hub "
                "id, reward.model.revision to a commit",
            )
        if "--" in entry:
            raise ConfigError(
                f"the model's code is in another repository ({entry} in {name}), which no revision pins",
                where=f"reward.model.path {config.path}",
                remedy="download the model, put the code beside it, and give that directory",
            )
    return bool(entries)


def _code_entries(folder: Path) -> Iterator[tuple[str, str]]:
    for name, classes in _CODE_ENTRIES.items():
        found = _json(folder / name).get("auto_map")
        if isinstance(found, list):  # tokenizers of old: the slow and the fast class
            found = {"AutoTokenizer": found}
        for kind in classes:
            entry = (found or {}).get(kind)
            for value in entry if isinstance(entry, list) else [entry]:
                if value:
                    yield name, str(value)


def _check_head(config: ModelRewardConfig, settings: dict[str, Any]) -> None:
    kinds = settings.get("architectures") or []
    if kinds and not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"the model is a {kinds[0]}, not a sequence classifier",
            where=f"reward.model.path {config.path}",
            remedy="give a reward model (...ForSequenceClassification)",
        )
    names = settings.get("id2label")
    check_label(config, len(names) if names else int(settings.get("num_labels") or _DEFAULT_LABELS))


def check_label(config: ModelRewardConfig, labels: int) -> None:
    """Raise ConfigError for several outputs without a `label`, and for an unknown `label`."""
    if config.label is None and labels != 1:
        raise ConfigError(
            f"the model has {labels} outputs",
            where=f"reward.model.path {config.path}",
            remedy=f"say which is the reward: reward.model.label, 0 to {labels - 1}",
        )
    if config.label is not None and config.label >= labels:
        raise ConfigError(
            f"reward.model.label {config.label} is not one of the model's {labels} outputs, counted from 0",
            where=f"reward.model.path {config.path}",
            remedy=f"use 0 to {labels - 1}",
        )


def _small_files(config: ModelRewardConfig, source: ModelSource) -> Path:
    """Return the cached folder of a hub model's small files at its commit."""
    from huggingface_hub import snapshot_download

    names = list(_CODE_ENTRIES)
    commit = source.identity["commit"]
    return Path(snapshot_download(config.path, revision=commit, allow_patterns=names))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"cannot read {path.name}: {error}", where=str(path)) from None
    return value if isinstance(value, dict) else {}
