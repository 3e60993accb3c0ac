"""How long the form of the deployment `align` is in Chromium: its height, and the inputs that it shows.

    python benchmarks/form_size.py [--output benchmarks/results/form_size.json]

The form is that of a fresh server (`make serve`, `make deploy`) in a window of 1280 x 900. Counted are the
boxes, choices and switches below the heading *Parameters* that are visible, and the whole height of the page.
`opened` is the same form after `settings` is opened, which has every setting of an experiment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from _result import ROOT, about, options, publish
from form_submissions import OURS, served

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
COUNT = """() => {
  const all = ['input', 'textarea', 'select', '[role=combobox]', '[role=switch]',
    'button[aria-haspopup=listbox]'];
  const found = document.querySelectorAll(all.map(each => `form ${each}`).join(', '));
  const shown = [...found].filter(each => each.offsetParent !== null && each.offsetHeight > 1);
  const heights = [...document.querySelectorAll('*')].map(each => each.scrollHeight);
  return {inputs: shown.length, height_px: Math.max(...heights)};
}"""


def measure(url: str) -> dict[str, Any]:
    """Inputs and height of the form as it opens, and with `settings` opened where the form has it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB", timezone_id="UTC")
        page.set_default_timeout(120_000)
        page.goto(f"{url}/v2/deployments")
        page.get_by_role("link", name="align", exact=True).first.click()
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Custom run").click()
        page.get_by_role("button", name="Submit").wait_for()
        found = {"short": drawn(page)}
        if (whole := page.get_by_role("tab", name="Experiment", exact=True)).count():
            whole.first.click()
            found["opened"] = drawn(page)
        browser.close()
    return found


def drawn(page: Any) -> Any:
    """What the page shows once it has stayed the same for ten seconds."""
    before = None
    while (found := page.evaluate(COUNT)) != before:
        before = found
        page.wait_for_timeout(10_000)
    return found


def main() -> None:
    """Serve, deploy, look, and publish."""
    given = options(__doc__).parse_args()
    with served(OURS) as url:
        subprocess.run(
            [sys.executable, "-m", "flows.service.deploy"],
            cwd=ROOT,
            env={**os.environ, "PREFECT_API_URL": url},
            check=True,
            capture_output=True,
        )
        found = measure(url.removesuffix("/api"))
    publish(about("form_size") | found, given.output)


if __name__ == "__main__":
    main()
