"""Replace the clock that chat templates read (`strftime_now`) by a fixed day."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path

_CLOCK = "strftime_now"
#: English names for every locale, so that a template's text is the same everywhere.
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
#: Replaces `%%` while directives are replaced.
_PERCENT = "\ue000"


def today() -> str:
    """The current day in UTC, YYYY-MM-DD; the same in every time zone."""
    return datetime.now(UTC).date().isoformat()


def reads_clock(template: str) -> bool:
    """Whether a template reads the clock (`strftime_now`)."""
    return _CLOCK in template


def folder_reads_clock(folder: Path) -> bool:
    """Whether the chat template in a model's directory reads the clock. Loads no tokenizer."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return reads_clock(jinja.read_text(encoding="utf-8"))
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
        except (FileNotFoundError, ValueError, AttributeError):
            continue  # `resolve_model` reports what is wrong
        if isinstance(found, list):  # several by name
            found = next((each.get("template") for each in found if each.get("name") == "default"), None)
        if found:
            return reads_clock(str(found))
    return False


def pin_date(template: str, day: str) -> str:
    """The template with a macro `strftime_now` before it, which always writes the given day at midnight.

    transformers passes its own `strftime_now` to every template and accepts no other, but a macro in the
    template takes precedence. The line break after the macro is removed by jinja (trim_blocks).
    """
    steps = "".join(
        f"|replace({json.dumps(name)},{json.dumps(text)})" for name, text in _directives(day).items()
    )
    swapped = f'format|replace("%%","{_PERCENT}"){steps}|replace("{_PERCENT}","%")'
    return f"{{% macro {_CLOCK}(format) %}}{{{{ {swapped} }}}}{{% endmacro %}}\n{template}"


def _directives(day: str) -> dict[str, str]:
    """The text of each strftime directive; directives that stand for several others come first."""
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
