"""The reward `python`: a user's function, from a batch of completions to a list of scores."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qrpo_core.common.errors import ConfigError, DataError
from qrpo_core.common.hashing import digest_file
from qrpo_core.common.progress import Progress, no_progress
from qrpo_core.config.rewards import PythonRewardConfig
from qrpo_core.rewards.base import GroundTruthProblem, RewardRequest, Score, clip, guarded
from qrpo_core.rewards.python import user_module

#: Digest of the file of each imported module. After an edit, the imported code would differ from the file.
_IMPORTED: dict[str, str] = {}
_IMPORTING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Row:
    """One completion, as the user's function gets it.

    messages : the turns of the prompt, each {"role": ..., "content": ...}, with the system turn.
    completion : its text, without end tokens.
    ground_truth : the prompt's ground truth as a Python value, or None.
    prompt_id, sample_index : identity of the completion, the same in every run.
    """

    messages: tuple[dict[str, str], ...]
    completion: str
    ground_truth: Any
    prompt_id: str
    sample_index: int

    @property
    def prompt(self) -> str:
        """The content of the prompt's last turn."""
        return self.messages[-1]["content"]


class PythonReward:
    """Calls `function(batch, **arguments)` with a list of `Row`, which returns a list of the same length.

    Its elements are numbers. None or (None, "reason") means a row without a score, which becomes
    `parse_error`. If the function raises, the batch is called again row by row: the rows that raise become
    `parse_error` with the exception's message. If it raises on every row of the first call, and the call has
    two rows or more, `score` raises ConfigError.

    The function runs in this process, without limits on time and memory, one call at a time.
    """

    needs_ground_truth = False

    def __init__(self, config: PythonRewardConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._returned = False
        self._raised: BaseException | None = None

    def problems(self, ground_truths: Iterable[tuple[str, str | None]]) -> list[GroundTruthProblem]:
        """Return []. Raises ConfigError if the function cannot be imported. Ground truths are not checked."""
        load_function(self._config)
        return []

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """Return one score a request, in the order of the requests.

        Raises ConfigError if the function does not exist or has raised on every row so far, and DataError if
        it returns a list of another length.
        """
        function = load_function(self._config)
        scores: list[Score] = []
        with self._lock:
            for start in range(0, len(requests), self._config.batch_size):
                batch = requests[start : start + self._config.batch_size]
                scores += self._batch(function, batch)
                progress(len(batch))
            if not self._returned and len(requests) > 1:
                raise self._broken(len(requests))
        return scores

    def close(self) -> None:
        """Do nothing: it holds nothing."""

    def _batch(self, function: Callable[..., Any], requests: Sequence[RewardRequest]) -> list[Score]:
        try:
            values = self._call(function, requests)
        except DataError:
            raise
        except (Exception, SystemExit) as error:  # a function that leaves the process has failed as well
            if len(requests) > 1:
                return [score for request in requests for score in self._batch(function, [request])]
            self._raised = error
            return [Score(None, "parse_error", clip(f"{type(error).__name__}: {error}"))]
        self._returned = True
        return [_score(value) for value in values]

    def _broken(self, rows: int) -> ConfigError:
        """Return the error for a function that raised on every row, with its exception and place."""
        error = self._raised
        trace = traceback.extract_tb(None if error is None else error.__traceback__)
        frames = [each for each in trace if each.filename != __file__]  # leave out our own call
        message = clip(f"{type(error).__name__}: {error}")
        place = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return ConfigError(
            f"the function fails on each of the first {rows} rows: {message}",
            where=f"reward.python.function {self._config.function!r}{place}",
            remedy="correct the function: it gets a list of rows and returns one number a row (docs/how-to)",
        )

    def _call(self, function: Callable[..., Any], requests: Sequence[RewardRequest]) -> list[Any]:
        returned = function([_row(request) for request in requests], **self._config.arguments)
        where = f"reward.python.function {self._config.function!r}"
        if isinstance(returned, str | bytes | dict | set) or not hasattr(returned, "__len__"):
            raise DataError(
                f"it returned a {type(returned).__name__} for {len(requests)} rows",
                where=where,
                remedy="return a list with one number a row",
            )
        if len(returned) != len(requests):
            raise DataError(
                f"it returned {len(returned)} scores for {len(requests)} rows",
                where=where,
                remedy="return one a row, in the order of the rows; None for a row without a score",
            )
        return list(returned)


def load_function(config: PythonRewardConfig) -> Callable[..., Any]:
    """Return the user's function, from the working directory before any other module.

    Raises ConfigError if module or function is missing, the import fails, or the module's file was edited
    after this process imported it.
    """
    name, attribute = _module(config), config.function.partition(":")[2]
    digest = function_identity(config)["source"]
    with _IMPORTING:
        module = _import(name, config)
        if _IMPORTED.setdefault(name, digest) != digest:
            raise ConfigError(
                f"the file of module {name!r} was edited after this process imported it",
                where="reward.python.function",
                remedy="start the run again: what is imported is not what the file says",
            )
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = "is not a function" if hasattr(module, attribute) else "does not exist"
        raise ConfigError(
            f"{attribute!r} {problem} in module {name!r}",
            where=f"reward.python.function, {module.__file__}",
            remedy="write it as module:function or file.py:function",
        )
    found: Callable[..., Any] = function
    return found


def function_identity(config: PythonRewardConfig) -> dict[str, str]:
    """Return the part of a recipe outside the config: the digest of the module's file.

    The module is not run, but the packages above it are imported to find it. Its own imports are not in the
    digest; `version` stands for their changes. Raises ConfigError if the module or its file does not exist.
    """
    name = _module(config)
    try:
        return {"source": digest_file(user_module.find_file(name))}
    except user_module.NoFile:
        raise ConfigError(
            f"module {name!r} has no file",
            where="reward.python.function",
            remedy="name the module that holds the function, not its package",
        ) from None
    except user_module.NotFound as error:
        raise _missing(name, str(error)) from None
    except Exception as error:
        raise _missing(name, f"{type(error).__name__}: {error}") from None


def _module(config: PythonRewardConfig) -> str:
    """The module's name for `user_module`: `file` where it is set."""
    return config.file or config.function.partition(":")[0]


def _import(name: str, config: PythonRewardConfig) -> ModuleType:
    try:
        return user_module.load(name)
    except Exception as error:
        raise _missing(name, f"{type(error).__name__}: {error}") from None


def _missing(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"module {name!r} cannot be imported ({clip(why, 200)})",
        where="reward.python.function",
        remedy="start the run in the directory that holds it, or install it",
    )


def _row(request: RewardRequest) -> Row:
    return Row(
        messages=tuple({"role": role, "content": content} for role, content in request.messages),
        completion=request.text,
        ground_truth=None if request.ground_truth is None else json.loads(request.ground_truth),
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
    )


def _score(value: Any) -> Score:
    match value:
        case None:
            return Score(None, "parse_error", "the function gave no score")
        # Not any sequence: from numpy 2.5 on an array is one, and one without dimensions has no length.
        case tuple((None, str() as reason)) | list((None, str() as reason)):
            return Score(None, "parse_error", clip(f"the function gave no score: {reason}"))
        case str() | bytes():
            return Score(None, "parse_error", clip(f"the function gave the text {value!r}, not a number"))
    number: Any = value
    # An array or tensor of one element, whatever its dimensions; `item` refuses several.
    return guarded(lambda: float(number.item() if callable(getattr(number, "item", None)) else number))
