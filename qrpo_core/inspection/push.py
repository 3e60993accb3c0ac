"""`qrpo push`: the trained policy with a card for others, into a directory or to a model hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrpo_core.common.errors import QRPOError
from qrpo_core.common.local_copies import Hold
from qrpo_core.common.new_directory import new_directory
from qrpo_core.pipeline import benchmarks, evaluation, policies
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.policies import ADAPTER
from qrpo_core.pipeline.workspace import Workspace

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
#: Seconds in which the hub must answer before anything is sent.
_ANSWER_WITHIN = 10.0
_CARD = "README.md"
_ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"


@dataclass(frozen=True)
class Upload:
    """The files of a shared policy: paths of the store's files, or new content in their place.

    held : keeps a copy of the store's files in the cache, as long as it takes to upload them.
    """

    files: Mapping[str, Path | bytes]
    held: Hold

    @property
    def card(self) -> str:
        content = self.files[_CARD]
        assert isinstance(content, bytes)
        return content.decode()


def prepare(workspace: Workspace, model: str, license: str, base_model: str | None) -> Upload:
    """The files of the experiment's policy, with the card that names `model`.

    base_model : hub id of the model that training starts from; None if `model.path` is one.

    Raises QRPOError for a wrong licence or base model, MissingError where the policy or its evaluation is
    missing.
    """
    from qrpo_core.reporting.hub_card import SharedPolicy, hub_card

    if _LICENSE.fullmatch(license) is None:
        raise QRPOError(
            f"{license!r} is no licence id", where="--license", remedy="that of the base model, as apache-2.0"
        )
    named = _base_model(workspace, base_model)
    steps, get = stored_steps(workspace), workspace.artifacts.get
    last = steps.last()
    end, train = steps.after(last), get(last.train_recipe)
    folder = workspace.artifacts.folder(train, "policy")
    policy = SharedPolicy(
        model,
        named,
        license,
        _data_set(workspace),
        workspace.experiment,
        evaluation.result_of(get(end.evaluate)),
        {each.name: benchmarks.result_of(get(each.result)) for each in end.benchmarks},
        train.facts["saved"],
    )
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files.pop(f"{ADAPTER}/{_CARD}", None)  # PEFT's, with the local path of the base model
    if _ADAPTER_CONFIG in files:
        files[_ADAPTER_CONFIG] = _without_place(folder / _ADAPTER_CONFIG, named)
    return Upload(files | {_CARD: hub_card(policy).encode()}, Hold(folder))


def write(upload: Upload, out: Path) -> Path:
    """Copy the files into a new directory, whole or not at all. QRPOError if it exists."""
    with new_directory(out, "--to") as scratch:
        for name, content in upload.files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (scratch / name).write_bytes(content)
            else:
                shutil.copyfile(content, scratch / name)
    return out


def check_repo(repo: str) -> None:
    """Refuse what is no OWNER/NAME."""
    if _REPO.fullmatch(repo) is None:
        raise QRPOError(f"{repo!r} is no repository of a hub", where="--repo", remedy="write OWNER/NAME")


def hub() -> HfApi:
    """The hub, asked who we are. QRPOError, within seconds, if it is away, or takes no token of ours."""
    import httpx
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        raise QRPOError("HF_HUB_OFFLINE is set", where="qrpo push", remedy="unset it, or write with --to")
    token = get_token()
    if token is None:
        raise QRPOError("no token of the hub", where="HF_TOKEN", remedy="set it, or run `hf auth login`")
    api = HfApi()
    try:  # the client of the package waits without limit
        headers = {"authorization": f"Bearer {token}"}
        answer = httpx.get(f"{api.endpoint}/api/whoami-v2", headers=headers, timeout=_ANSWER_WITHIN)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise QRPOError(
            f"the hub gives no answer within {_ANSWER_WITHIN:g} s ({type(error).__name__})",
            where=str(api.endpoint),
            remedy="look at HF_ENDPOINT and the connection, or write with --to",
        ) from None
    if answer.status_code != 200:
        raise QRPOError(
            f"the hub answers {answer.status_code}",
            where=str(api.endpoint),
            remedy="look at HF_ENDPOINT and at the token (HF_TOKEN)",
        )
    return api


def push(api: HfApi, upload: Upload, repo: str, *, public: bool) -> str:
    """Upload in one commit, and return its page. The hub checks the card before anything is sent.

    public : whether a new repository is public; an existing one stays as it is.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, ModelCard

    try:
        ModelCard(upload.card).validate()
        api.create_repo(repo, private=not public, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        done = api.create_commit(repo, operations, commit_message="Policy trained with qrpo")
    except ValueError as error:
        raise QRPOError(f"the hub refuses the card: {_refusal(error)}", where=repo) from None
    except (httpx.HTTPError, OSError) as error:
        raise QRPOError(f"the upload failed: {_brief(error)}", where=repo, remedy="try again") from None
    return str(done.repo_url)


def uploaded_lines(upload: Upload, where: str) -> Iterator[str]:
    """What was written, and where."""
    from qrpo_core.common.formatting import size

    amount = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in upload.files.values())
    yield f"{len(upload.files)} files, {size(amount)}, with a card: {where}"


def _base_model(workspace: Workspace, given: str | None) -> str | None:
    source = policies.source_of(workspace)
    if given is not None:
        if given != "none" and _REPO.fullmatch(given) is None:
            raise QRPOError(
                f"{given!r} is no model of a hub", where="--base-model", remedy="write OWNER/NAME, or none"
            )
        return None if given == "none" else given
    if source.kind == "hub":
        return source.location
    raise QRPOError(
        f"model.path {workspace.experiment.model.path!r} is not on a hub, so the card cannot name it",
        where="--base-model",
        remedy="give the hub's name of this model as --base-model OWNER/NAME, or none",
    )


def _data_set(workspace: Workspace) -> str | None:
    """The hub id of the prompts' data set; None for files and generated prompts."""
    prompts = workspace.experiment.prompts
    name = prompts.name or ""
    return name if prompts.kind == "hub" and not Path(name).exists() and _REPO.fullmatch(name) else None


def _without_place(config: Path, base_model: str | None) -> bytes:
    """The adapter's config with the hub's name of its base in place of a path."""
    found: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    return json.dumps(found | {"base_model_name_or_path": base_model}, indent=2).encode()


def _refusal(error: ValueError) -> str:
    """The messages of the hub's answer."""
    try:
        return "; ".join(each["message"] for each in json.loads(str(error))["errors"])
    except (ValueError, LookupError, TypeError):
        return _brief(error)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
