"""Which classifier `reward.model` names: found, checked and digested without reading its weights.

Reads JSON files only: neither torch nor transformers is imported, and no code that a model brings is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo_core.config import ModelConfig
from qrpo_core.errors import ConfigError, ModelError
from qrpo_core.ids import digest_file, digest_json
from qrpo_core.policy import PACKAGE_PREFIX, ModelSource, resolve_model
from qrpo_core.rewards.config import ModelRewardConfig, RewardConfig

_COMMIT = re.compile(r"[0-9a-f]{40}")
#: Where a model says that it brings code, and for which of the classes that are loaded here.
_CODE_ENTRIES = {
    "config.json": ("AutoConfig", "AutoModelForSequenceClassification"),
    "tokenizer_config.json": ("AutoTokenizer",),
}
#: What transformers takes where config.json says nothing of labels.
_DEFAULT_LABELS = 2


def locate(config: ModelRewardConfig) -> ModelSource:
    """The source of a reward model, with everything checked that its JSON files tell.

    A hub model's small files are downloaded where they are not cached, its weights are not.

    Raises
    ------
    ConfigError : code of the model's own without trust, or trust in a hub id that is not pinned to a commit
        (before anything is downloaded); a model that is no sequence classifier; several outputs and no
        `label`, or a `label` that it has not; a `max_length` above the model's own.
    ModelError : files that are missing: config, weights, tokenizer or chat template.
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
    """What names the model's scores: content digests of a directory, the commit of a hub model. Never a path.

    Code in folders of a trusted directory is digested too. Raises what `locate` raises.
    """
    source = locate(config)
    identity = dict(source.identity)
    if config.trust_remote_code and source.kind == "directory":
        root = Path(source.location)
        files = sorted(root.rglob("*.py"))
        identity["code"] = digest_json({str(file.relative_to(root)): digest_file(file) for file in files})
    return identity


def dated(config: RewardConfig, day: str) -> RewardConfig:
    """The reward with `day` as the date of every model that has none and whose template asks for one."""
    if config.model is not None and config.model.date is None and locate(config.model).reads_clock:
        return config.model_copy(update={"model": config.model.model_copy(update={"date": day})})
    if config.terms:
        terms = [t.model_copy(update={"reward": dated(t.reward, day)}) for t in config.terms]
        return config.model_copy(update={"terms": tuple(terms)})
    return config


def brings_code(folder: Path) -> bool:
    """Whether the tokenizer or the classifier of a directory is code in that directory."""
    return any(True for _ in _code_entries(folder))


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
    """Whether the model brings code; refused without trust, and where the code is not in the same place."""
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
    """Refuse (ConfigError) several outputs without a `label`, and a `label` that a model has not."""
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
    """The cached folder of a hub model's small files, at the commit that was found."""
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
