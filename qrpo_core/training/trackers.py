"""Trackers of a training: transformers' own reporters, whose failure ends no training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

_logger = logging.getLogger("qrpo.train")

#: Variables of the trackers' own packages, which count where they are set. By MLflow's own limits one request
#: to a server that has gone waits for minutes.
_DEFAULTS: dict[str, dict[str, str]] = {
    "wandb": {"WANDB_PROJECT": "qrpo"},
    "tensorboard": {},
    "mlflow": {
        "MLFLOW_EXPERIMENT_NAME": "qrpo",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    },
}


def tracker(name: str, run_name: str) -> TrainerCallback:
    """The callback that reports to a tracker: wandb, tensorboard or mlflow.

    run_name : names the run, and TensorBoard's folder below `runs` of the working directory
        (TENSORBOARD_LOGGING_DIR where it is set).
    """
    from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

    for variable, value in _DEFAULTS[name].items():
        os.environ.setdefault(variable, value)
    if name == "tensorboard":
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "runs")
        made = TensorBoardCallback()
        made.logging_dir = os.path.join(made.logging_dir, run_name)
    else:
        made = WandbCallback() if name == "wandb" else MLflowCallback()
    return LenientCallback(made, name)


class LenientCallback(TrainerCallback):  # type: ignore[misc]
    """Passes the events of a training on to a tracker until the tracker fails, which is one warning."""

    def __init__(self, tracker: TrainerCallback, name: str) -> None:
        self.tracker, self.name = tracker, name
        self.failed = False

    def _pass_on(self, event: str, *given: Any, **named: Any) -> None:
        if self.failed:
            return
        handle: Callable[..., Any] = getattr(self.tracker, event)
        try:
            handle(*given, **named)
        except Exception as error:
            self.failed = True
            problem = " ".join(str(error).split())[:300]
            _logger.warning("%s failed, and gets nothing more of this training: %s", self.name, problem)

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        self._pass_on("on_train_begin", *given, **named)

    def on_log(self, *given: Any, **named: Any) -> None:
        self._pass_on("on_log", *given, **named)

    def on_train_end(self, *given: Any, **named: Any) -> None:
        self._pass_on("on_train_end", *given, **named)
