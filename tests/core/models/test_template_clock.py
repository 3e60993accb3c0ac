"""Templates on one day: as strftime writes it, wherever and whenever they are rendered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from qrpo_core.config import ModelConfig, PromptsConfig
from qrpo_core.config.section import Day
from qrpo_core.models.template_clock import folder_reads_clock, pin_date, reads_clock
from tests.core.models.chat_families import FAMILIES

TURNS = [[{"role": "user", "content": "Hi"}]]
DIRECTIVES = [f"%{letter}" for letter in "aAbBcdDeFhHIjmMnprRStTuUwWVGyYxXzZ"] + ["%-d", "%-m", "%-I", "%-j"]


def rendered(template: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    text: str = render_jinja_template(TURNS, chat_template=template)[0][0]
    return text


@settings(max_examples=30)
@given(st.dates(date(1900, 1, 1), date(2999, 12, 31)))
def test_every_directive_is_strftimes(day: date) -> None:
    form = "; ".join(f"100%% {directive}, {directive}" for directive in DIRECTIVES)
    expected = datetime(day.year, day.month, day.day).strftime(form)
    assert rendered(pin_date("{{ strftime_now('" + form + "') }}", day.isoformat())) == expected


@pytest.mark.parametrize(
    "template",
    [
        "\n\n  {% if true %}\nx{% endif %}\n",
        "   {% if true %}y{% endif %} \n",
        "{{- 'z' }}",
        "  {{ 'q' }}",
        "{%- if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{%- endif %}\n{{ d }}",
        "{% macro m(f) %}{{ strftime_now(f) ~ '!' }}{% endmacro %}{% if 1 %}{{ m('%Y') }}{% endif %}",
    ],
)
def test_all_else_of_a_template_is_as_before(template: str) -> None:
    assert rendered(pin_date(template, datetime.now().date().isoformat())) == rendered(template)


def test_which_templates_read_the_clock(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    dated = FAMILIES["llama3.2"].template
    assert reads_clock(dated)
    assert not any(reads_clock(each.template) for name, each in FAMILIES.items() if name != "llama3.2")
    folder = make_tiny_model(tmp_path / "plain")
    assert not folder_reads_clock(folder)
    (folder / "chat_template.jinja").write_text(dated)
    assert folder_reads_clock(folder)
    (folder / "chat_template.jinja").unlink()
    stored_settings = json.loads((folder / "tokenizer_config.json").read_text())
    for stored, expected in (
        (dated, True),
        ("x", False),
        ([{"name": "tools", "template": dated}, {"name": "default", "template": "x"}], False),
        ([{"name": "default", "template": dated}], True),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(stored_settings | {"chat_template": stored}))
        assert folder_reads_clock(folder) == expected


def test_two_time_zones_give_the_same_tokens(
    make_tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment it is another day in the one than in the other."""
    from qrpo_core.models.chat import Chat

    template = (
        "{{ bos_token + strftime_now('%d %B %Y') }}{% for m in messages %}{{ '<|user|>' + m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = make_tiny_model(tmp_path / "dated", template=template)
    days, prompts = [], []
    try:
        for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            days.append(date.today())
            chat = Chat.load(folder, day="2024-07-05")
            prompts.append(chat.prompt_token_ids([{"role": "user", "content": "Hi"}]))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert days[0] != days[1]
    assert prompts[0] == prompts[1]
    assert "05 July 2024" in chat.decode(prompts[0])


class Named(BaseModel):
    day: Day


@pytest.mark.parametrize("given_day", ["2024-07-05", date(2024, 7, 5)])
def test_a_day_is_written_with_or_without_quotes(given_day: Any) -> None:
    assert Named(day=given_day).day == "2024-07-05"


@pytest.mark.parametrize("given_day", ["2024-02-30", "5 July 2024", "20240705", 20240705])
def test_what_is_no_day_is_refused(given_day: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Day).validate_python(given_day)


def test_a_day_belongs_to_every_kind_of_prompts() -> None:
    assert PromptsConfig(kind="file", path="p.jsonl", date="2024-07-05").date == "2024-07-05"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("date_string", date(2024, 7, 5), "is not a JSON value; put a date in quotes"),
        ("tools", {"a": {1, 2}}, "is not a JSON value"),
        ("x", float("nan"), "is not a JSON value"),
        ("tokenize", True, "the pipeline sets"),
        ("add_generation_prompt", False, "the pipeline sets"),
    ],
)
def test_variables_of_templates_are_json(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(path="m", chat_template_kwargs={name: value})
    assert ModelConfig(path="m", chat_template_kwargs={"enable_thinking": False, "tools": [{"a": 1}]})
