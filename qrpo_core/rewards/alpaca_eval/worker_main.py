"""The program that asks the package alpaca-eval: JSON lines on standard input, JSON lines on standard output.

`worker` runs it as a script, in whichever environment has the package; it imports nothing of this project.
A request is {"do", "annotator", ...}, a reply {"value": ...} or {"error": "Type: message"}. The package
writes the judge's questions and reads its answers. It sends nothing itself: `reward` asks the judge.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from functools import lru_cache
from typing import Any

#: Settings of an annotator's completions that do not belong in a request.
_LOCAL = ("model_name", "num_procs", "batch_size", "price_per_token", "client_kwargs", "requires_chatml")


def main() -> None:
    """Answer requests until standard input ends."""
    # Requests and replies get descriptors of their own: the package prints progress.
    requests = os.fdopen(os.dup(0), encoding="ascii")
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then closes the pipe
    for line in requests:
        print(json.dumps(_reply(json.loads(line))), file=replies, flush=True)


def _reply(request: dict[str, Any]) -> dict[str, Any]:
    logging.disable(logging.CRITICAL)
    try:
        return {"value": _DO[request.pop("do")](**request)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


@lru_cache
def _annotator(name: str) -> Any:
    """The package's annotator without its own cache; ValueError for one that asks no chat endpoint."""
    from alpaca_eval.annotators import PairwiseAnnotator
    from alpaca_eval.constants import EVALUATORS_CONFIG_DIR

    if not (EVALUATORS_CONFIG_DIR / name / "configs.yaml").exists():
        known = sorted(path.parent.name for path in EVALUATORS_CONFIG_DIR.glob("weighted_*/configs.yaml"))
        raise ValueError(f"alpaca-eval has no annotator {name!r}; some that it has: {', '.join(known)}")
    found = PairwiseAnnotator(annotators_config=name, caching_path=None, is_avoid_reannotations=False)
    for single in found.annotators.values():
        asks = getattr(single.fn_completions, "__name__", "")
        if len(found.annotators) > 1 or asks != "openai_completions" or single.batch_size != 1:
            raise ValueError(f"annotator {name!r} asks no single chat endpoint about one row at a time")
    return found


def _single(annotator: str) -> Any:
    (single,) = _annotator(annotator).annotators.values()
    return single


def _describe(annotator: str) -> dict[str, Any]:
    """The fields of every request, and the name of the annotator's own judge."""
    settings = _single(annotator).completions_kwargs
    fields = {name: value for name, value in settings.items() if name not in _LOCAL}
    return {"model": settings["model_name"], "fields": fields}


def _ask(annotator: str, rows: list[dict[str, Any]]) -> list[list[dict[str, str]] | None]:
    """The messages of the question about each row; None where the outputs are equal and nothing is asked.

    rows : instruction, output_1 (the baseline's), output_2 (the model's).
    """
    from alpaca_eval.utils import prompt_to_chatml

    prompts = _prompts(annotator, rows)
    return [None if prompt is None else prompt_to_chatml(prompt.strip()) for prompt in prompts]


def _prompts(annotator: str, rows: list[dict[str, Any]]) -> list[str | None]:
    """The package's prompt of each row, which it may ask with the outputs switched and in another order."""
    prompts: list[str] = []

    def numbered(prompts_of_call: list[str]) -> list[dict[str, Any]]:
        prompts.extend(prompts_of_call)
        return [{"text": "m", "total_tokens": 0, "number": place} for place in range(len(prompts_of_call))]

    found = _annotate(annotator, rows, numbered, lambda completion: [1])
    places = [row.get("preference_raw_completion") for row in found]
    return [prompts[place["number"]] if isinstance(place, dict) else None for place in places]


def _read(
    annotator: str, rows: list[dict[str, Any]], answers: list[dict[str, Any] | None]
) -> list[float | None]:
    """The preference of each row in [1, 2], 2 for output_2; None for an answer that states none.

    answers : of the judge, the first choice of its reply. Equal outputs are 1.5 by the package's rule.
    """
    given = dict(zip(_prompts(annotator, rows), answers, strict=True))

    def answered(prompts: list[str]) -> list[dict[str, Any]]:
        return [_choice(given[prompt]) for prompt in prompts]

    found = _annotate(annotator, rows, answered, None)
    return [None if row["preference"] is None else float(row["preference"]) for row in found]


def _choice(answer: dict[str, Any] | None) -> dict[str, Any]:
    """A choice in the form in which the package's own client hands it on."""
    if answer is None:
        return {"text": "", "total_tokens": 0}
    message = answer["message"]
    calls = message.get("tool_calls") or ()
    text = calls[0]["function"]["arguments"] if calls else message.get("content")
    return {**answer, "text": text or " ", "total_tokens": 0}


def _annotate(annotator: str, rows: list[dict[str, Any]], complete: Any, parse: Any) -> list[dict[str, Any]]:
    """The package's annotations, in the order of the rows. parse : None for the annotator's own parser."""
    single = _single(annotator)
    kept = single.fn_completions, single.fn_completion_parser, single.completion_key

    def completions(prompts: list[str], **_: Any) -> dict[str, Any]:
        found = complete(prompts)
        zeros = [0.0] * len(found)
        return {
            "completions": [each["text"] for each in found],
            "completions_all": found,
            "price_per_example": zeros,
            "time_per_example": zeros,
        }

    single.fn_completions = completions
    if parse is not None:
        single.fn_completion_parser, single.completion_key = parse, "completions_all"
    try:
        found = _annotator(annotator)([{**row, "row": place} for place, row in enumerate(rows)], None)
    finally:
        single.fn_completions, single.fn_completion_parser, single.completion_key = kept
    return sorted(found, key=lambda row: int(row["row"]))


def _reach() -> int:
    """For how many instructions the data of the length-controlled win rate is here, or can be fetched."""
    import pandas
    from alpaca_eval.metrics import glm_winrate

    path = glm_winrate.hf_hub_download("tatsu-lab/alpaca_eval", "df_gamed.csv", repo_type="dataset")
    return int(pandas.read_csv(path)["index"].max()) + 1


def _measure(annotator: str, rows: list[dict[str, Any]], length_controlled: bool) -> dict[str, float]:
    """The package's metrics, in percent. rows : index (in the benchmark), output_1, output_2, preference.

    length_controlled : also fit the package's model of length, with its data from the hub or its cache.
    """
    import pandas
    from alpaca_eval import metrics

    frame = pandas.DataFrame(rows).set_index("index")
    frame["annotator"], frame["generator_1"], frame["generator_2"] = annotator, "baseline", "policy"
    if length_controlled:
        found = metrics.get_length_controlled_winrate(frame, save_weights_dir=None)
    else:
        found = metrics.get_winrate(frame)
    return {name: float(value) for name, value in found.items()}


_DO: dict[str, Callable[..., Any]] = {
    "describe": _describe,
    "ask": _ask,
    "read": _read,
    "reach": _reach,
    "measure": _measure,
}

if __name__ == "__main__":
    main()
