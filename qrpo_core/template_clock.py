"""The clock that chat templates read (`strftime_now`), and one day in its place."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path

_CLOCK = "strftime_now"
#: English, whatever the locale of the machine: a template's words are the same everywhere.
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
#: Stands for `%%` while the directives are replaced.
_PERCENT = "\ue000"


def today() -> str:
    """The day in UTC, as YYYY-MM-DD: the same on every machine, whatever its time zone."""
    return datetime.now(UTC).date().isoformat()


def reads_clock(template: str) -> bool:
    """Whether a template asks for the time (`strftime_now`)."""
    return _CLOCK in template


def folder_reads_clock(folder: Path) -> bool:
    """Whether the chat template of a model's directory asks for the time. Loads no tokenizer."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return reads_clock(jinja.read_text(encoding="utf-8"))
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except (FileNotFoundError, ValueError, AttributeError):
            continue  # `resolve_model` says what is wrong with it
        if isinstance(found, list):  # several by name
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if found:
            return reads_clock(str(found))
    return False


def pin_date(template: str, day: str) -> str:
    """The template with `strftime_now` as a function of its own that knows one day alone, at midnight.

    transformers puts the clock's `strftime_now` beside every template and takes no other from the caller.
    What a template defines itself goes before it. The definition ends with a line break, which jinja removes
    (trim_blocks), so the template begins at the beginning of a line, as before.
    """
    steps = "".join(
        f"|replace({json.dumps(name)},{json.dumps(text)})" for name, text in _directives(day).items()
    )
    swapped = f'format|replace("%%","{_PERCENT}"){steps}|replace("{_PERCENT}","%")'
    return f"{{% macro {_CLOCK}(format) %}}{{{{ {swapped} }}}}{{% endmacro %}}\n{template}"


def _directives(day: str) -> dict[str, str]:
    """What strftime writes for each directive; those that stand for several come first."""
    at = datetime.combine(date.fromisoformat(day), datetime.min.time())
    name, month = _DAYS[at.weekday()], _MONTHS[at.month - 1]
    found = {
        "%c": f"{name[:3]} {month[:3]} {at.day:2d} 00:00:00 {at.year}",
        "%a": name[:3],
        "%A": name,
        "%b": month[:3],
        "%h": month[:3],
        "%B": month,
        "%p": "AM",
        "%e": f"{at.day:2d}",
        "%D": at.strftime("%m/%d/%y"),
        "%x": at.strftime("%m/%d/%y"),
        "%F": day,
        "%T": "00:00:00",
        "%X": "00:00:00",
        "%R": "00:00",
        "%r": "12:00:00 AM",
        "%Z": "",
        "%z": "",
        "%n": "\n",
        "%t": "\t",
    }
    for letter in "dmyYHIMSfjuUwWVG":
        text = at.strftime(f"%{letter}")
        found[f"%{letter}"] = text
        if letter != "f":
            found[f"%-{letter}"] = text.lstrip("0") or "0"
    return found
