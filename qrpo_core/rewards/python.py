"""The reward `python`: a function of the user's, a batch of completions in and a list of scores out."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qrpo_core.engines.base import Progress, no_progress
from qrpo_core.errors import ConfigError, DataError
from qrpo_core.ids import digest_file
from qrpo_core.rewards import user_module
from qrpo_core.rewards.base import ReferenceProblem, RewardRequest, Score, clip, guarded
from qrpo_core.rewards.config import PythonRewardConfig

#: Digest of the file that each imported module came from: an edit behind it would not be what runs.
_IMPORTED: dict[str, str] = {}
_IMPORTING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Row:
    """One completion, as the user's function gets it.

    messages : the prompt's turns, each {"role": ..., "content": ...}, system turn included.
    completion : its text, without end tokens.
    reference : the prompt's reference as a value (its JSON is read), or None where there is none.
    prompt_id, sample_index : together the completion's identity, the same in every run.
    """

    messages: tuple[dict[str, str], ...]
    completion: str
    reference: Any
    prompt_id: str
    sample_index: int

    @property
    def prompt(self) -> str:
        """The content of the prompt's last turn."""
        return self.messages[-1]["content"]


class PythonReward:
    """Calls `function(batch, **arguments)` with a list of `Row`; it returns a list of the same length.

    An element is a number, or None or (None, "reason") for a row without a score, which is then a
    `parse_error` with that reason. A batch in which the function raises is asked again row by row: only
    rows that raise by themselves are `parse_error`, with the exception's message. A function that raises on
    every row of a first call, of two rows or more, is broken: that is a ConfigError with its own error.

    The function runs in this process, without limits on time and memory, one call at a time.
    """

    needs_reference = False

    def __init__(self, config: PythonRewardConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._returned = False
        self._raised: BaseException | None = None

    def problems(self, references: Iterable[tuple[str, str | None]]) -> list[ReferenceProblem]:
        """None: references are not looked at. Imports the module and finds the function (ConfigError)."""
        load_function(self._config)
        return []

    def score(self, requests: Sequence[RewardRequest], progress: Progress = no_progress) -> list[Score]:
        """One score a request, in the order of the requests.

        Raises ConfigError for a function that is not there, or that has raised on every row so far; DataError
        for a list of another length.
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
        """Nothing is held."""

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
        """What to say of a function that has raised on every row: its error, and where it arose."""
        error = self._raised
        trace = traceback.extract_tb(None if error is None else error.__traceback__)
        frames = [each for each in trace if each.filename != __file__]  # the call itself tells nothing
        said = clip(f"{type(error).__name__}: {error}")
        place = f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return ConfigError(
            f"the function fails on each of the first {rows} rows: {said}",
            where=f"reward.python.function {self._config.function!r}{place}",
            remedy="mend the function: it gets a list of rows and returns one number a row (docs/rewards.md)",
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
    """The user's function; its module is imported, that of the working directory before any other.

    Raises ConfigError where module or function is missing, the import fails, or the module's file was
    edited after this process imported it.
    """
    name, _, attribute = config.function.partition(":")
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
    """What names the scores beside the section: the digest of the module's file. The module is not run.

    (Packages that it stands in are imported to find it.) What that file imports is not part of it: that
    is what `version` is for. Raises ConfigError where there is no such module or it has no file.
    """
    name = config.function.partition(":")[0]
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
        reference=None if request.reference is None else json.loads(request.reference),
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
