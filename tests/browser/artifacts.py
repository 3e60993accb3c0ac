"""Artifacts on the page of a run, in the UI of either version of Prefect."""

from __future__ import annotations

import re
from typing import Any


def card(page: Any, key: str) -> Any:
    """An artifact on a run's page: it leads to all with this key (Prefect 3.8), or to itself (3.9)."""
    itself = f"a[href*='/artifacts/artifact/']:has(h3:text-is('{key}'))"
    return page.locator(f"a[href$='/artifacts/key/{key}'], {itself}").first


def open_artifact(page: Any, key: str) -> None:
    """From a run's page to its artifact; of all with its key, the newest comes first."""
    page.get_by_role("tab", name="Artifacts").click()
    card(page, key).click()
    page.wait_for_url(re.compile("/artifacts/"))
    if "/artifacts/key/" in page.url:
        page.locator("a[href*='/artifacts/artifact/']").first.click()
    page.get_by_text("Last Updated", exact=True).wait_for()  # of the run that made it
