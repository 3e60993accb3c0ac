"""Run every command of reference/cli.md in order and put its output there: `python docs/run_examples.py`.

The experiment is small and needs no weights from outside: a two-layer model made here, the fake engine, 16
prompts. Needs the development dependencies.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "cli.md"
EXPERIMENT = {
    "model": {"path": "tiny", "dtype": "float32"},
    "prompts": {
        "kind": "template",
        "templates": ["Name a {colour} {thing}"],
        "words": {"colour": ["red", "blue", "green", "black"], "thing": ["cup", "door", "hat", "car"]},
        "size": 16,
        "held_out": 0.3,
    },
    "sampling": {"engine": "fake", "references_per_prompt": 4, "max_new_tokens": 12},
    "reward": {"kind": "length", "max_words": 1},
    "training": {"precision": "fp32", "batch_size": 8, "learning_rate": 1.0e-3},
    "evaluation": {"samples_per_prompt": 2, "resamples": 1000},
    "store": {"path": "store", "rows_per_block": 16},
}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.conftest import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_tiny_model(work / "tiny")
        (work / "small.yaml").write_text(yaml.safe_dump(EXPERIMENT))
        environment = os.environ | {"PREFECT_HOME": str(work / "prefect"), "QRPO_CACHE": str(work / "cache")}

        def output(match: re.Match[str]) -> str:
            command = match[1]
            if "verify" in command and "--repair" in command:
                damage(work)
            words = shlex.split(command.replace("PROMPT", prompt(work)))
            done = subprocess.run(
                [sys.executable, "-m", "flows.cli", *words[1:]],
                cwd=work,
                env=environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=None,
                text=True,
            )
            print(f"{done.returncode} {command}", file=sys.stderr)
            text = done.stdout.replace(str(work), "/home/me").rstrip()
            return f"```\n$ {command.replace('PROMPT', prompt(work))}\n{text}\n```"

        page = PAGE.read_text(encoding="utf-8")
        page = re.sub(r"(?<=qrpo explain small\.yaml )[0-9a-f]{8}", "PROMPT", page)
        PAGE.write_text(re.sub(r"```\n\$ (qrpo [^\n]*)\n.*?```", output, page, flags=re.S), encoding="utf-8")


def prompt(work: Path) -> str:
    """The beginning of a training prompt's id, once there are prompts."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in work.glob("store/artifacts/prompts/**/*.parquet")]
    rows = [row for table in tables if "split" in table.column_names for row in table.to_pylist()]
    return min((row["prompt_id"] for row in rows if row["split"] == "train"), default="PROMPT")[:8]


def damage(work: Path) -> None:
    """Flip a bit of a block of rewards."""
    path = min(work.glob("store/blocks/reward/*/rows/*.parquet"))
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


if __name__ == "__main__":
    main()
