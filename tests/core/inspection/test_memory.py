"""The memory of a run's stages on a GPU: what is counted, what is refused, and that remedies help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qrpo_core.common.errors import ConfigError
from qrpo_core.inspection import memory
from qrpo_core.inspection.memory import check_memory, refuse_too_large, stage_memory, visible_gpu_memory
from qrpo_core.inspection.plan import plan
from qrpo_core.inspection.plan_text import memory_lines
from qrpo_core.inspection.stage_plan import StagePlan
from qrpo_core.inspection.stage_work import work_of
from qrpo_core.pipeline.workspace import Workspace
from tests.core.small_experiment import changed

#: A model of 1.24 billion parameters; its weights are not there, and nothing looks for them.
BILLION = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
GB = 10**9


def missing(*stages: str) -> list[StagePlan]:
    return [StagePlan(stage, 0, 1, "") for stage in stages]


@pytest.fixture
def billion(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of an experiment whose model has 1.24 billion parameters."""
    shape = memory.ModelShape.of_config(BILLION)
    monkeypatch.setattr(memory, "policy_shape", lambda workspace: shape)
    return settings | {
        "model": settings["model"] | {"dtype": "bfloat16"},
        "sampling": settings["sampling"] | {"max_new_tokens": 4096},
        "training": {"batch_size": 128},
    }


def of(settings: dict[str, Any], stage: str, gpu: int | None, **sections: Any) -> memory.StageMemory:
    (found,) = stage_memory(Workspace(changed(settings, **sections)), missing(stage), gpu)
    return found


def test_a_plan_on_a_cpu_shows_figures_and_refuses_nothing(settings: dict[str, Any]) -> None:
    workspace = Workspace(changed(settings, sampling={"engine": "transformers"}))
    found = stage_memory(workspace, plan(workspace), None)
    assert [each.stage for each in found] == [
        "sample references",
        "score reference log-probs",
        "train policy",
        "score policy log-probs, after",
    ][: len(found)]
    assert len(found) >= 3
    refuse_too_large(found)
    text = "\n".join(memory_lines(found, None))
    assert "In host memory" in text
    assert "optimiser" in text
    assert memory_lines([], None) == []


def test_what_cannot_fit_is_one_line_with_settings_that_can(billion: dict[str, Any]) -> None:
    gpu = 24 * GB
    wanted = of(billion, "train policy", gpu)
    assert 30 * GB < wanted.total < 60 * GB
    with pytest.raises(ConfigError) as caught:
        refuse_too_large([wanted])
    line = str(caught.value)
    assert line.startswith("train policy needs ")
    assert "it has 24 GB" in line
    assert "\n" not in line
    assert "training.parallel fsdp with processes 2" in line
    for change in ({"lora_rank": 16, "lora_base": "bfloat16", "activation_checkpointing": 1.0},):
        assert of(billion, "train policy", gpu, training=change).fits


def test_every_remedy_of_one_setting_fits(billion: dict[str, Any]) -> None:
    gpu, seen = 29 * GB, set()
    for setting in of(billion, "train policy", gpu).remedies:
        name, _, value = setting.removeprefix("training.").partition(" ")
        if " with " not in setting:
            change = {name: json.loads(value)}
            assert of(billion, "train policy", gpu, training=change).fits, setting
            seen.add(name)
    assert seen == {"activation_checkpointing", "lora_rank", "micro_batch_tokens"}


def test_the_tokens_of_a_pass_are_bounded_by_the_prompts(billion: dict[str, Any]) -> None:
    """One short row a step: the pass has its tokens, not those of micro_batch_tokens."""
    short = {"sampling": {"max_new_tokens": 16}}
    one = of(billion, "train policy", 80 * GB, training={"batch_size": 1}, **short)
    many = of(billion, "train policy", 80 * GB, training={"batch_size": 1000}, **short)
    (small,) = (what for what in one.parts if what.startswith("activations"))
    assert small == "activations of 86 tokens"  # "Say 11", a turn's 64, and 16 new ones
    assert one.parts[small] < many.parts["activations of 8,192 tokens"] / 50
    assert "gradients" in many.parts


def test_vllm_needs_its_weights_and_the_longest_row_within_its_share(billion: dict[str, Any]) -> None:
    sampling: dict[str, Any] = {"engine": "vllm"}
    whole = of(billion, "sample references", 8 * GB, sampling=sampling)
    assert whole.parts["weights"] == pytest.approx(2 * 1.236 * GB, rel=0.01)
    # 2 x 16 layers x 512 x 131,072 positions x 2 bytes
    assert whole.parts["cache of the longest row"] == 2 * 16 * 512 * 131072 * 2
    assert whole.limit == int(0.9 * 8 * GB)
    assert whole.fits
    assert not of(billion, "sample references", 7 * GB, sampling=sampling).fits
    short = {"sampling": sampling, "vllm": {"max_length": 4096}}
    assert of(billion, "sample references", 7 * GB, **short).fits
    split = {"sampling": sampling, "vllm": {"tensor_parallel_size": 2}}
    assert of(billion, "sample references", 7 * GB, **split).total == whole.total // 2


@pytest.mark.parametrize("engine", ["fake", "endpoint"])
def test_engines_without_a_model_here_need_nothing(billion: dict[str, Any], engine: str) -> None:
    served = {"endpoint": {"url": "http://127.0.0.1:9/v1"}} if engine == "endpoint" else {}
    workspace = Workspace(changed(billion, sampling={"engine": engine}, **served))
    assert stage_memory(workspace, missing("sample references", "annotate references"), GB) == []


@pytest.mark.parametrize("stage", ["sample held-out, after", "sample completions, round 2"])
def test_a_trained_policy_is_drawn_from_here_whatever_serves_the_reference(
    billion: dict[str, Any], stage: str
) -> None:
    served = {"sampling": {"engine": "endpoint"}, "endpoint": {"url": "http://127.0.0.1:9/v1"}}
    here = of(billion, stage, 80 * GB, sampling={"engine": "transformers"})
    assert of(billion, stage, 80 * GB, **served).parts == here.parts
    assert work_of(changed(billion, **served), stage).gpus == 1
    assert work_of(changed(billion, **served), "sample held-out, before").gpus == 0


def test_the_arithmetic_of_log_probs_is_that_of_training(billion: dict[str, Any]) -> None:
    plain = of(billion, "score reference log-probs", 80 * GB, training={"weights_dtype": "float32"})
    adapted = {"training": {"precision": "bf16", "lora_rank": 8, "lora_base": "bfloat16"}}
    rounded = of(billion, "score reference log-probs", 80 * GB, **adapted)
    assert of(billion, "score reference log-probs", 80 * GB).parts == rounded.parts
    assert plain.parts["weights"] == 2 * rounded.parts["weights"]
    kl = of(billion, "score policy log-probs, after", 80 * GB, **adapted)
    assert kl.parts["weights"] == plain.parts["weights"]


def test_layers_without_a_formula_are_never_refused(
    billion: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "policy_shape", lambda workspace: None)
    workspace = Workspace(changed(billion))
    assert stage_memory(workspace, missing("train policy", "score reference log-probs"), 1) == []
    other = memory.ModelShape.of_config(BILLION | {"model_type": "of tomorrow"})
    monkeypatch.setattr(memory, "policy_shape", lambda workspace: other)
    found = stage_memory(workspace, missing("train policy"), 1)
    refuse_too_large(found)
    assert "nothing is refused" in "\n".join(memory_lines(found, 1))


@pytest.mark.parametrize(
    ("flow", "pooled", "refused"),
    [
        ("align", False, "sample references"),
        ("precompute", False, "sample references"),
        ("precompute", True, None),  # the workers' own GPUs
        ("align", True, "train policy"),
        ("train", False, "train policy"),
        ("evaluate", False, "sample held-out"),
        ("evaluate", True, None),
        ("compare", True, "train policy"),
        ("sample-shard", False, None),
    ],
)
def test_a_flow_is_refused_for_the_stages_that_it_runs_here(
    settings: dict[str, Any],
    flow: str,
    pooled: bool,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace = Workspace(changed(settings, sampling={"engine": "transformers"}))
    monkeypatch.setattr(memory, "visible_gpu_memory", lambda: 1000)
    if refused is None:
        check_memory(workspace, flow, pooled=pooled)
        return
    with pytest.raises(ConfigError, match=f"^{refused}"):
        check_memory(workspace, flow, pooled=pooled)
    monkeypatch.setattr(memory, "visible_gpu_memory", lambda: None)
    check_memory(workspace, flow, pooled=pooled)


def test_the_memory_of_the_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0, GPU-aa, 81559\\n1, GPU-bb, 24576\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    seen = {}
    for given in ("0", "1", "0,1", "GPU-aa", "", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        seen[given] = visible_gpu_memory()
    large, small = 81559 << 20, 24576 << 20
    assert seen == {"0": large, "1": small, "0,1": small, "GPU-aa": large, "": None, "-1": None}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpu_memory() == small
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert visible_gpu_memory() is None
