"""The engine vllm beyond the contract: its processes, what they see, how they end; GPUs, shares, adapters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import EngineError
from qrpo_core.common.hashing import sample_seed
from qrpo_core.config.reading import parse_experiment
from qrpo_core.engines.base import Completion, LogprobRequest, SampleRequest, SamplingParams
from qrpo_core.engines.transformers import TransformersEngine
from qrpo_core.engines.validation import checked_completion, checked_logprobs, signed_seed
from qrpo_core.engines.vllm import VllmEngine, split_rows
from qrpo_core.engines.vllm_process import VllmProcess, environment
from qrpo_core.pipeline.policies import Policy
from qrpo_core.pipeline.row_recipes import sample_recipe
from qrpo_core.pipeline.workspace import Workspace
from tests.vllm import shared

PARAMS = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=8, stop_token_ids=(257, 258))


def requests(prompts: int, samples: int = 3) -> list[SampleRequest]:
    return [
        SampleRequest(f"p{row}", index, tuple(range(row, row + 9)), sample_seed(0, f"p{row}", index))
        for row in range(prompts)
        for index in range(samples)
    ]


def test_the_child_sees_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "OPENAI_API_KEY", "VLLM_API_KEY")
    for name in (*secrets, "WANDB_API_KEY", "PREFECT_API_URL", "PYTHONPATH"):
        monkeypatch.setenv(name, "not-a-secret")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("HF_HOME", "/models")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen = environment([], 3)
    assert "not-a-secret" not in seen.values()
    assert {"PATH", "HOME"} <= set(seen)
    assert (seen["HF_HOME"], seen["VLLM_CPU_KVCACHE_SPACE"], seen["OMP_NUM_THREADS"]) == ("/models", "7", "3")
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(["4", "5"], 3)["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_seeds_fit_into_signed_numbers_and_stay_apart() -> None:
    seeds = [0, 1, 2**32, 2**63 - 1, 2**63 + 5, 2**64 - 1]
    taken = [signed_seed(seed) for seed in seeds]
    assert all(0 <= seed < 2**63 for seed in taken)
    assert taken[:4] == seeds[:4]
    assert taken[4] == 5


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 50)), max_size=60), engines=st.integers(1, 4)
)
def test_prompts_stay_together_and_work_is_balanced(rows: list[tuple[int, int]], engines: int) -> None:
    prompts, work = [(prompt,) for prompt, _ in rows], [each for _, each in rows]
    shares = split_rows(prompts, work, engines)
    assert sorted(row for share in shares for row in share) == list(range(len(rows)))
    homes = [{prompts[row] for row in share} for share in shares]
    assert sum(map(len, homes)) == len(set(prompts))
    loads = [sum(work[row] for row in share) for share in shares]
    largest = max((sum(w for p, w in rows if p == prompt) for prompt in range(7)), default=0)
    assert max(loads) - min(loads) <= largest


class TestAnswers:
    REQUEST = SampleRequest("p", 3, (1,), 9)

    def test_the_end_says_the_reason(self) -> None:
        done = checked_completion(self.REQUEST, [5, 257], [-0.75, -0.25], PARAMS)
        assert done == Completion("p", 3, 9, (5, 257), "stop", -1.0)
        assert checked_completion(self.REQUEST, [5] * 8, [-1.0] * 8, PARAMS).finish_reason == "length"

    @pytest.mark.parametrize("ids", [[], [5], [5] * 7, [5] * 9, [257, 5], [5] * 8 + [257]])
    def test_an_end_that_nobody_asked_for(self, ids: list[int]) -> None:
        with pytest.raises(EngineError, match="prompt p, sample 3"):
            checked_completion(self.REQUEST, ids, [-1.0] * len(ids), PARAMS)

    def test_a_logprob_that_is_none(self) -> None:
        with pytest.raises(EngineError, match=r"nan.*prompt p, sample 3"):
            checked_completion(self.REQUEST, [5, 257], [-1.0, float("nan")], PARAMS)
        with pytest.raises(EngineError, match=r"2 tokens and 1 log-probs.*row 4"):
            checked_logprobs([-1.0], 2, 4)


def test_rows_of_a_quantised_policy_are_another_policys(tiny_model: Path, tmp_path: Path) -> None:
    def policy(engine: str, quantization: str | None) -> str:
        settings: dict[str, Any] = {
            "model": {"path": str(tiny_model)},
            "prompts": {"kind": "file", "path": "questions.jsonl"},
            "reward": {"kind": "length", "max_words": 1},
            "sampling": {"engine": engine},
            "vllm": {"quantization": quantization},
            "store": {"path": str(tmp_path)},
        }
        workspace = Workspace(parse_experiment(settings))
        return str(sample_recipe(workspace, Policy("digest", Path)).inputs["policy"])

    assert policy("vllm", None) == policy("transformers", "fp8") == "digest"
    assert policy("vllm", "fp8") == "fp8:digest"


def test_an_engine_that_fails_names_its_log() -> None:
    """The real processes, in an environment without vLLM; nothing of them is left."""
    process = VllmProcess(sys.executable, {"model": {}, "adapters": None, "batch_invariant": False})
    with pytest.raises(EngineError, match=r"No module named 'vllm'.*last lines") as caught:
        process.receive(60.0)
    log = Path(str(caught.value.where))
    assert "Traceback" in log.read_text()
    assert not process.alive
    assert members(process.pid) == []
    process.close()
    assert log.exists()


def members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def gone(groups: list[int], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(members(group) for group in groups):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    shared.skip_without_vllm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", shared.KV_CACHE_GIB)
        yield shared.write_model(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def adapted(model: Path) -> tuple[Path, Path]:
    """Adapters beside the model, and the model that they merge into."""
    import torch

    from qrpo_core.config import TrainingConfig
    from qrpo_core.models.loading import load_model, load_tokenizer
    from qrpo_core.training.lora import add_adapters, merge, save_adapters

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        peft = add_adapters(load_model(model, "float32"), TrainingConfig(lora_rank=4))
        for name, weight in peft.named_parameters():
            if "lora_B" in name:  # zero before training
                weight.normal_(std=0.2)
    adapters, merged = model.with_name("adapters"), model.with_name("merged")
    save_adapters(peft, adapters)
    merge(peft).save_pretrained(merged)
    load_tokenizer(model).save_pretrained(merged)
    return adapters, merged


@pytest.fixture(scope="module")
def engine(model: Path, adapted: tuple[Path, Path]) -> Iterator[VllmEngine]:
    engine = VllmEngine(model, "float32", shared.CONFIG, adapters=adapted[0])
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.vllm
class TestTheProcess:
    """One engine with adapters beside the model, killed on the way."""

    def test_adapters_are_used_unmerged(
        self, engine: VllmEngine, model: Path, adapted: tuple[Path, Path]
    ) -> None:
        assert engine.name == "vllm/cpu/float32"
        asked = requests(4)
        drawn = engine.sample(asked, PARAMS)
        scores = [LogprobRequest(r.prompt_token_ids, c.token_ids) for r, c in zip(asked, drawn, strict=True)]
        merged = TransformersEngine(adapted[1], "float32").logprobs(scores)
        plain = TransformersEngine(model, "float32").logprobs(scores)
        np.testing.assert_allclose([c.logprob for c in drawn], merged, rtol=0, atol=1e-3)
        np.testing.assert_allclose(engine.logprobs(scores), merged, rtol=0, atol=1e-3)
        by_token = engine.token_logprobs([*scores, LogprobRequest((1,), ())])
        assert [len(row) for row in by_token] == [len(c.token_ids) for c in drawn] + [0]
        np.testing.assert_allclose([row.sum() for row in by_token[:-1]], merged, rtol=0, atol=1e-3)
        assert np.abs(plain - merged).max() > 1.0

    def test_rows_are_those_of_the_engine_transformers(
        self, engine: VllmEngine, adapted: tuple[Path, Path]
    ) -> None:
        """One seed draws one row in both, but where rounding decides."""
        assert engine.facts["runner"] == "V1"
        assert not engine.exact
        assert engine.rows_are_alone() in (True, False)
        other = TransformersEngine(adapted[1], "float32")
        asked = requests(30, samples=4)
        for params in (PARAMS, replace(PARAMS, temperature=0.7, top_p=0.8)):
            ours, theirs = engine.sample(asked, params), other.sample(asked, params)
            differing = sum(a.token_ids != b.token_ids for a, b in zip(ours, theirs, strict=True))
            assert differing <= 2

    def test_a_temperature_that_vllm_would_change(self, engine: VllmEngine) -> None:
        with pytest.raises(EngineError, match=r"0.001 is below 0.01.*sampling.temperature"):
            engine.sample(requests(1), replace(PARAMS, temperature=0.001))

    def test_the_longest_sequence_is_scored(self, engine: VllmEngine, adapted: tuple[Path, Path]) -> None:
        longest = [LogprobRequest((1,) * 500, (7,) * 12), LogprobRequest((1,) * 511, (7,))]
        merged = TransformersEngine(adapted[1], "float32").logprobs(longest)
        np.testing.assert_allclose(engine.logprobs(longest), merged, rtol=0, atol=1e-3)

    def test_killed_it_is_an_error_that_names_its_log_and_the_next_try_goes_on(
        self, engine: VllmEngine
    ) -> None:
        asked = requests(40, samples=8)
        before = engine.sample(asked[:8], PARAMS)
        process = engine._processes[0]
        assert process is not None
        victim = max(members(process.pid))  # the one with the model; the other is its watcher
        steps: list[int] = []

        def kill(rows: int) -> None:
            steps.append(rows)
            os.kill(victim, signal.SIGKILL)

        with pytest.raises(EngineError, match=r"process died.*ended: SIGKILL \[.*\.log\]"):
            engine.sample(asked, replace(PARAMS, max_new_tokens=64, stop_token_ids=()), kill)
        assert sum(steps) < len(asked)
        assert gone([process.pid])
        assert engine.sample(asked[:8], PARAMS) == before
        engine.close()
        assert not process.alive


#: A process with two engines that draws, tells its engines' groups, and waits to be killed.
PARENT = """
import json, sys, time
from pathlib import Path
from qrpo_core.config.engines import VllmConfig
from qrpo_core.engines.vllm import VllmEngine
from tests.core.engines.test_vllm import PARAMS, requests
engine = VllmEngine(Path(sys.argv[1]), "float32", VllmConfig.model_validate_json(sys.argv[2]))
drawn = engine.sample(requests(6), PARAMS)
rows = [[c.prompt_id, c.sample_index, list(c.token_ids), c.logprob] for c in drawn]
print(json.dumps({"rows": rows, "groups": [p.pid for p in engine._processes]}), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.vllm
def test_two_engines_share_the_rows_and_die_with_their_parent(model: Path) -> None:
    """With processes of vLLM's own below ours: a real SIGKILL of the parent leaves none."""
    config = shared.CONFIG.model_copy(update={"engines": 2})
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model), config.model_dump_json()],
        env={
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "PYTHONPATH": str(shared.ROOT),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        told = json.loads(parent.stdout.readline())
        assert [row[:2] for row in told["rows"]] == [[r.prompt_id, r.sample_index] for r in requests(6)]
        sums = TransformersEngine(model, "float32").logprobs(
            [
                LogprobRequest(r.prompt_token_ids, tuple(row[2]))
                for r, row in zip(requests(6), told["rows"], strict=True)
            ]
        )
        np.testing.assert_allclose([row[3] for row in told["rows"]], sums, rtol=0, atol=1e-3)
        assert [len(members(group)) >= 3 for group in told["groups"]] == [True, True]
        parent.kill()
        parent.wait()
        assert gone(told["groups"])
    finally:
        parent.kill()
        parent.wait()
