"""The check of the trackers of `training.report_to`, before anything is computed."""

from __future__ import annotations

import netrc
import os
from urllib.parse import urlsplit

import httpx

from qrpo_core.common.errors import ConfigError
from qrpo_core.common.extras import require
from qrpo_core.config import TrainingConfig

#: Seconds in which a tracker's server must answer. The packages' own limits are minutes.
ANSWER_WITHIN = 10.0
_WHERE = "training.report_to"


def check_trackers(training: TrainingConfig) -> None:
    """Raise ConfigError for a tracker whose package, account or server is missing."""
    for name in training.report_to:
        require(name, f"{_WHERE} {name!r}", where=_WHERE)
        if name == "mlflow":
            address = os.environ.get("MLFLOW_TRACKING_URI", "")
            if address.startswith(("http://", "https://")):
                _reach(f"{address.rstrip('/')}/health", "MLflow", "MLFLOW_TRACKING_URI")
        elif name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
            address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
            if not _has_key(address):
                raise ConfigError(
                    f"no key of Weights & Biases for {address}",
                    where=_WHERE,
                    remedy="run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline",
                )
            _reach(address, "Weights & Biases", "WANDB_BASE_URL, or set WANDB_MODE=offline")


def _reach(url: str, what: str, setting: str) -> None:
    """Any answer below 500 will do: it says that a server is there."""
    try:
        status = httpx.get(url, timeout=ANSWER_WITHIN, follow_redirects=True).status_code
        problem = f"answers {status}" if status >= 500 else ""
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = f"gives no answer within {ANSWER_WITHIN:g} s ({type(error).__name__})"
    if problem:
        raise ConfigError(
            f"{what} at {url} {problem}",
            where=_WHERE,
            remedy=f"start it, look at {setting}, or leave it out",
        )


def _has_key(address: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        accounts = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return accounts.authenticators(urlsplit(address).hostname or "") is not None
