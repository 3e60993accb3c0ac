"""What the engine vllm asks of a machine before it starts, and the arguments that vLLM gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qrpo_core.common.errors import ConfigError, EngineError
from qrpo_core.config.engines import VllmConfig
from qrpo_core.engines.vllm_setup import gpu_groups, llm_arguments, require, visible_gpus


class TestPreflight:
    @pytest.mark.parametrize("python", [sys.executable, "/nowhere/bin/python", "/bin/false"])
    def test_an_interpreter_without_vllm(self, python: str) -> None:
        with pytest.raises(ConfigError, match=r"has no vLLM \[vllm.python\]: make vllm-env"):
            require(VllmConfig(python=python))

    def test_gpus_are_dealt_in_groups(self) -> None:
        assert gpu_groups(VllmConfig(), []) == [[]]
        assert gpu_groups(VllmConfig(engines=2), []) == [[], []]
        assert gpu_groups(VllmConfig(), ["0", "1", "5"]) == [["0"], ["1"], ["5"]]
        assert gpu_groups(VllmConfig(tensor_parallel_size=2), list("0123")) == [["0", "1"], ["2", "3"]]
        assert gpu_groups(VllmConfig(engines=1), ["3", "4"]) == [["3"]]

    @pytest.mark.parametrize("wrong", [{"engines": 3}, {"tensor_parallel_size": 4}])
    def test_more_gpus_than_are_visible(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match=r"2 are visible.*vllm.engines"):
            gpu_groups(VllmConfig(**wrong), ["0", "1"])  # type: ignore[arg-type]

    def test_batch_invariance_needs_a_gpu(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        python = tmp_path / "python"  # an interpreter that has every module
        python.write_text("#!/bin/sh\nexit 0\n")
        python.chmod(0o755)
        config = VllmConfig(python=str(python))
        require(config)
        with pytest.raises(ConfigError, match=r"no NVIDIA GPU is visible \[vllm.batch_invariant\]: set it"):
            require(config.model_copy(update={"batch_invariant": True}))

    def test_sequences_at_a_time_are_vllms_choice_unless_given(self, tmp_path: Path) -> None:
        assert "max_num_seqs" not in llm_arguments(tmp_path, "float32", VllmConfig(), None)
        given = llm_arguments(tmp_path, "float32", VllmConfig(max_sequences=7), None)
        assert given["max_num_seqs"] == 7

    def test_visible_gpus_are_those_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 7")
        assert visible_gpus() == ["2", "7"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert visible_gpus() == []

    def test_adapters_need_room_for_their_rank(self, tmp_path: Path) -> None:
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps({"r": 4, "rank_pattern": {"q": 12}, "target_modules": ["a.q", "v"]}))
        arguments = llm_arguments(tmp_path, "float32", VllmConfig(), tmp_path)
        assert (arguments["max_lora_rank"], arguments["lora_target_modules"]) == (16, ["q", "v"])
        config.write_text(json.dumps({"r": 1000, "target_modules": ["q"]}))
        with pytest.raises(EngineError, match="rank 1000"):
            llm_arguments(tmp_path, "float32", VllmConfig(), tmp_path)
        with pytest.raises(EngineError, match=r"no LoRA adapters.*nothing"):
            llm_arguments(tmp_path, "float32", VllmConfig(), tmp_path / "nothing")
