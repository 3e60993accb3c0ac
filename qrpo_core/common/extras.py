"""Packages that an extra of qrpo brings: `pip install 'qrpo[EXTRA]'`."""

from __future__ import annotations

import importlib.util

from qrpo_core.common.errors import ConfigError

#: The extra that brings a package, by the name it is imported by.
EXTRA_OF = {
    "prefect": "pipeline",
    "botocore": "pipeline",
    "s3fs": "pipeline",
    "matplotlib": "pipeline",
    "vaderSentiment": "rewards",
    "reasoning_gym": "rewards",
    "math_verify": "rewards",
    "peft": "lora",
    "gguf": "gguf",
    "ray": "ray",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
}


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str, what: str, *, where: str | None = None) -> None:
    """Raise ConfigError if a package of an extra is not installed; the package is not imported.

    package : its import name, a key of EXTRA_OF.
    what : the setting or command that needs it.
    """
    if not installed(package):
        raise ConfigError(
            f"{what} needs the package {package}",
            where=where,
            remedy=f"pip install 'qrpo[{EXTRA_OF[package]}]'",
        )
