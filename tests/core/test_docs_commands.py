"""Commands in the documents do what the page says: they parse, and their experiments are valid."""

from __future__ import annotations

import contextlib
import io
from itertools import pairwise
from types import NoneType
from typing import Any, get_args

import pytest

from flows.cli.main import _parser
from qrpo_core.common.errors import ConfigError
from qrpo_core.config import Experiment
from qrpo_core.config.comparison import ComparisonConfig
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.variants import expand
from tests.documents import ROOT, commands


def test_every_command_line_in_the_documents_is_understood() -> None:
    found = list(commands("qrpo"))
    assert len(found) > 20
    for page, words in found:
        with contextlib.redirect_stderr(io.StringIO()) as complaint, contextlib.suppress(SystemExit):
            _parser().parse_args(words)
            continue
        pytest.fail(f"{page}: qrpo {' '.join(words)}: {complaint.getvalue()}")


def test_overrides_in_the_documents_are_settings() -> None:
    for page, words in commands("qrpo"):
        for option, value in pairwise(words):
            if option == "--set":
                section: Any = Experiment
                for key in value.partition("=")[0].split("."):
                    assert key in section.model_fields, f"{page}: {value}"
                    section = section.model_fields[key].annotation
                    section = next((each for each in get_args(section) if each is not NoneType), section)


def test_commands_on_the_experiments_of_the_repository_are_valid() -> None:
    """With their overrides, and each variant of a comparison."""
    wrong, seen = [], 0
    for page, words in commands("qrpo"):
        options = _parser().parse_args(words)
        path = str(getattr(options, "experiment", None) or "")
        if not path.startswith("experiments/"):
            continue
        try:
            experiment = load_experiment(ROOT / path, options.set)
            varied = {"vary": getattr(options, "vary", None), "variants": getattr(options, "variant", None)}
            if any(varied.values()):
                expand(
                    experiment, ComparisonConfig(**{key: tuple(value or ()) for key, value in varied.items()})
                )
        except ConfigError as error:
            wrong.append(f"{page}: qrpo {' '.join(words)}: {error}")
        seen += 1
    assert not wrong, "\n".join(wrong)
    assert seen > 10
