"""Write the generated parts of the documents: `python docs/generate.py`.

- reference/configuration.md: the table below each heading that names a section; the other text stays.
- reference/cli.md: the usage of every command at its top.
- glossary.md: the keys of every section at its end.
- reference/python.md: the documented Python interface, from its docstrings.
- how-to/train-from-python.md, how-to/gpu-benchmark.md: the tables of the result files in benchmarks/results.

tests/core/test_docs.py compares the files with what this script would write.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from flows.cli.main import _parser
from qrpo_core.config import Experiment, RewardConfig, Section, WeightedTerm
from qrpo_core.config.benchmarks import BenchmarkConfig
from qrpo_core.config.prompts import PromptExample
from qrpo_core.config.rewards import ThinkingMarks
from qrpo_core.config.section import NOT_IN_CACHE_KEY

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"
RESULTS = DOCS.parent / "benchmarks" / "results"
HEADER = "| field | type | default | meaning |\n|---|---|---|---|\n"

#: Left out of their own section's key, and added to the keys of the steps whose result they change.
ADDED_WHERE_USED = {"prompts.date", "evaluation.prompts", "training.temperature", "training.weights_dtype"}

#: What the runs of benchmarks/training_vs_trl.py are called in the table; the others are in the file.
RUNS_BESIDE_TRL = {
    "ours_dpo": "DPO",
    "ours_qrpo": "QRPO",
    "ours_dpo_small_passes": "DPO in small microbatches",
    "trl_precomputed": "reference log-probs computed before",
    "trl_reference": "the reference model in memory",
    "trl_precomputed_single_pairs": "reference log-probs computed before, one pair a microbatch",
}

#: The documented Python interface: heading, module, names (None: every name in the module's __all__).
INTERFACE: list[tuple[str, str, tuple[str, ...] | None]] = [
    ("The trainer", "qrpo_core.training.trainer", ("QRPOTrainer",)),
    ("What it trains on", "qrpo_core.data.collator", ("Example", "Pair")),
    ("Items of text", "qrpo_core.pipeline.text_items", ("text_items",)),
    ("Engines", "qrpo_core.engines.base", ("Engine", "SampleRequest", "LogprobRequest", "Completion")),
    ("The embedded engine", "qrpo_core.engines.transformers", ("TransformersEngine",)),
    ("An engine for tests", "qrpo_core.engines.fake", ("FakeEngine",)),
    ("Rewards", "qrpo_core.rewards.base", ("Reward", "RewardRequest", "Score")),
    ("A reward from its configuration", "qrpo_core.rewards.registry", ("make_reward",)),
    ("Experiments", "qrpo_core.config.reading", ("load_experiment", "parse_experiment")),
    ("The mathematics", "qrpo_core.objective", None),
]


def sections() -> dict[str, type[Section]]:
    """{name as in configuration.md: section}, the experiment itself included."""
    found: dict[str, type[Section]] = {"experiment": Experiment}
    for name, field in Experiment.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, Section):
            found[name] = field.annotation
    found["evaluation.benchmarks"] = BenchmarkConfig
    found |= {
        "prompts.examples": PromptExample,
        "reward.terms": WeightedTerm,
        "reward.thinking": ThinkingMarks,
    }
    for name, field in RewardConfig.model_fields.items():
        for kind in get_args(field.annotation):
            if inspect.isclass(kind) and issubclass(kind, Section) and kind is not WeightedTerm:
                found[f"reward.{name}"] = kind
    return found


def configuration(text: str) -> str:
    """The page with the table of every section as the code has it."""
    for name, section in sections().items():
        table = HEADER + "".join(_row(name, *field) for field in section.model_fields.items())
        heading = re.escape(f"## `{name}`\n")
        text, count = re.subn(
            rf"({heading}(?:(?!\n## ).)*?)\| field \| type[^\n]*\n(?:\|[^\n]*\n)*",
            lambda match, table=table: match[1] + table,  # type: ignore[misc]
            text,
            flags=re.S,
        )
        if not count:
            raise SystemExit(f"docs/reference/configuration.md: no heading ## `{name}` with a table below it")
    return text


def _row(section: str, name: str, field: FieldInfo) -> str:
    unkeyed = field.json_schema_extra == NOT_IN_CACHE_KEY and f"{section}.{name}" not in ADDED_WHERE_USED
    description = (field.description or "").replace("|", "\\|")
    target = name if section == "experiment" else f"{section}.{name}"
    if target in sections():
        description = f"{description} See [`{target}`](#{target.replace('.', '')}).".strip()
    mark = " *no recompute*" if unkeyed else ""
    return f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {description}{mark} |\n"


def _type(annotation: Any) -> str:
    arguments = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if NoneType in arguments:
        (kind,) = (_type(each) for each in arguments if each is not NoneType)
        return f"{kind} or null"
    if inspect.isclass(annotation):
        return "section" if issubclass(annotation, Section) else annotation.__name__
    if get_origin(annotation) is tuple:
        return f"list of {_type(arguments[0])}".replace("section", "sections")
    if get_origin(annotation) is dict:
        return "mapping" if arguments[1] is Any else f"mapping of names to {_type(arguments[1])}"
    if arguments:
        return "one of " + ", ".join(f"`{each}`" for each in arguments)
    return "list of sections"  # a name that pydantic resolves later: reward.terms


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its defaults"
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        return "the known marks"
    return f"`{json.dumps(value)}`"


def command_line(text: str) -> str:
    """The page with the usage of every command."""
    lines = [usage for usage, _ in commands().values()]
    block = "```\n" + "\n".join(lines) + "\n```\n"
    return re.sub(r"```\nqrpo run .*?```\n", lambda _: block, text, count=1, flags=re.S)


def commands() -> dict[str, tuple[str, list[str]]]:
    """{verb: (usage on one line, its options)}."""
    (verbs,) = (each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    found = {}
    for name, parser in verbs.choices.items():
        parser.prog, parser.formatter_class = f"qrpo {name}", _Wide
        usage = parser.format_usage().removeprefix("usage: ").replace("[-h] ", "").replace(" [-h]", "")
        options = [each for action in parser._actions for each in action.option_strings if each[:2] == "--"]
        found[name] = usage.strip(), [each for each in options if each != "--help"]
    return found


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=1000)


def glossary(text: str) -> str:
    """The page with the keys of every section."""
    keys = "".join(
        f"- [`{name}`](reference/configuration.md#{name.replace('.', '')}): "
        + ", ".join(f"`{key}`" for key in sorted(section.model_fields))
        + "\n"
        for name, section in sections().items()
    )
    return _between_marks(text, keys)


def _between_marks(text: str, written: str) -> str:
    """The page with another text between its marks."""
    return re.sub(
        r"(<!-- generated -->\n).*(<!-- end -->)", lambda m: m[1] + written + m[2], text, flags=re.S
    )


def beside_trl(text: str) -> str:
    """The page with the ratios of training_vs_trl.json, those below 1 too."""
    found = json.loads((RESULTS / "training_vs_trl.json").read_text(encoding="utf-8"))
    job, machine = found["job"], found["hardware"]
    steps = job.get("rounds", job.get("steps"))
    table = (
        f"SmolLM2-135M in {job['precision']}, {machine['cores']} cores, {steps} steps of "
        f"{job['pairs_a_step']} pairs, rows of {job['row_tokens']['mean']} tokens; "
        f"commit {found['commit'][:8]}:\n\n"
        "| ours | TRL's DPOTrainer with | tokens/s, ours / TRL's | peak memory |\n|---|---|---|---|\n"
    )
    for name, ratio in found["ratios_ours_over_trl"].items():
        sides = [RUNS_BESIDE_TRL.get(side) for side in name.split(" / ")]
        if all(sides):
            spread = " ({:.2f} to {:.2f})".format(*ratio["range"]) if "range" in ratio else ""
            rate, peak = f"{ratio['tokens_per_second']:.2f}{spread}", f"{ratio['peak_memory']:.2f}"
            table += f"| {sides[0]} | {sides[1]} | {rate} | {peak} |\n"
    most = max(each["loss_nats"] for each in found["largest_difference_from_trl_reference"].values())
    return _between_marks(text, f"{table}\nDPO's losses differ by at most {most:g} nats.\n")


def on_a_gpu(text: str) -> str:
    """The page with the table of gpu/table.json, or that there is none."""
    file = RESULTS / "gpu" / "table.json"
    if not file.is_file():
        return _between_marks(
            text,
            "**No result of this benchmark is committed yet: how fast this version is on a GPU is not "
            "known.**\n",
        )
    found = json.loads(file.read_text(encoding="utf-8"))
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    gpu = found["hardware"]["gpu"].split(",")[0]
    return _between_marks(text, f"Measured on one {gpu}, commit {found['commit'][:8]}:\n\n{table}")


def python_interface() -> str:
    """The page of the documented names, in the order of INTERFACE."""
    parts = [
        "# Python\n\nThe documented interface, from its docstrings (`python docs/generate.py` writes this "
        "page). Other names may change without notice. Shapes are in brackets; log-probs are in nats. "
        "How to use the trainer: [Train from Python](../how-to/train-from-python.md).\n"
    ]
    for heading, module_name, names in INTERFACE:
        module = importlib.import_module(module_name)
        parts.append(f"\n## {heading}\n\n`from {module_name} import ...`\n")
        for name in names or sorted(module.__all__, key=str.lower):
            parts.extend(_entry(name, getattr(module, name)))
    return "".join(parts)


def _entry(name: str, value: Any) -> Iterator[str]:
    if not callable(value) or get_origin(value) is not None:
        yield f"\n### `{name}`\n\n```text\n{_literal(value)}\n```\n"
        return
    yield f"\n### `{name}{_signature(value)}`\n\n```text\n{inspect.getdoc(value)}\n```\n"
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                title = f"`{name}.{method}{_signature(function)}`"
                yield f"\n{title}\n\n```text\n{inspect.getdoc(function)}\n```\n"


def _literal(value: Any) -> str:
    return ", ".join(map(str, get_args(value) or value))


class _Annotation:
    """Written in a signature as it stands in the source."""

    def __init__(self, text: object) -> None:
        self.text = text if isinstance(text, str) else inspect.formatannotation(text)

    def __repr__(self) -> str:
        return self.text


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    empty = inspect.Parameter.empty
    parameters = [
        each if each.annotation is empty else each.replace(annotation=_Annotation(each.annotation))
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    returns = signature.return_annotation
    if inspect.isclass(value) or returns in (empty, None, "None"):
        returns = empty
    elif returns is not empty:
        returns = _Annotation(returns)
    return re.sub(r" at 0x\w+", "", str(signature.replace(parameters=parameters, return_annotation=returns)))


def pages() -> dict[Path, str]:
    """{file: what it should hold}."""
    writers = {
        DOCS / "glossary.md": glossary,
        DOCS / "how-to" / "gpu-benchmark.md": on_a_gpu,
        DOCS / "how-to" / "train-from-python.md": beside_trl,
        REFERENCE / "configuration.md": configuration,
        REFERENCE / "cli.md": command_line,
    }
    written = {path: write(path.read_text(encoding="utf-8")) for path, write in writers.items()}
    return written | {REFERENCE / "python.md": python_interface()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
