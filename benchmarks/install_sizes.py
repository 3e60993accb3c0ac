"""What each extra installs, with the locked versions, in an environment that has nothing else.

The environments lie in a temporary folder: `pip install` makes that of the core; each extra is installed into
a copy of it, then a module that needs it is imported. pip takes packages from the indexes it is configured
for, so the size of torch depends on them: a CPU build has no CUDA libraries. Sizes are those of `du -sm` on
site-packages, compiled files and pip included.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _result import ROOT, about, options, publish

#: Each extra and what is imported to see that it is enough.
EXTRAS = {
    "": "qrpo_core.training.trainer",
    "pipeline": "flows.align, qrpo_core.store.backends.s3, qrpo_core.reporting.html.plots",
    "rewards": "qrpo_core.rewards.sentiment, reasoning_gym, math_verify, vaderSentiment",
    "lora": "qrpo_core.training.lora, peft",
    "gguf": "qrpo_core.models.gguf_tokenizer, gguf",
    "demo": "flows.align, gguf, math_verify",
}


def install(environment: Path, extra: str) -> dict[str, Any]:
    """Install the package with an extra; the number of packages there, their size and the seconds it took."""
    pip = [f"{environment}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    began = time.monotonic()
    wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
    subprocess.run([*pip, "install", "-c", str(ROOT / "requirements.lock"), wanted], check=True)
    seconds = time.monotonic() - began
    # -I: what is imported is what was installed, not the working directory.
    subprocess.run([pip[0], "-I", "-c", f"import {EXTRAS[extra]}"], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    size = subprocess.run(["du", "-sm", packages], check=True, capture_output=True, text=True).stdout
    return {
        "extra": extra or "none",
        "packages": len(list(packages.glob("*.dist-info"))),
        "MiB": int(size.split()[0]),
        "install_seconds": round(seconds, 1),
    }


def main() -> None:
    arguments = options(__doc__).parse_args()
    result = about("install_sizes")
    with tempfile.TemporaryDirectory() as folder:
        core = Path(folder) / "core"
        subprocess.run([sys.executable, "-m", "venv", core], check=True)
        rows = [install(core, "")]
        for extra in filter(None, EXTRAS):
            copy = Path(folder) / extra
            shutil.copytree(core, copy, symlinks=True)
            rows.append(install(copy, extra))
            shutil.rmtree(copy)
    publish(result | {"installs": rows}, arguments.output)


if __name__ == "__main__":
    main()
