"""docs/tutorial.md: its commands run in order, with a two-layer policy and a one-layer reward model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli.main import main
from flows.service.server import PrefectServer
from qrpo_core.config.reading import load_experiment
from qrpo_core.pipeline.experiment_steps import stored_steps
from qrpo_core.pipeline.workspace import Workspace

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)[0]


def write_classifier(policy: Path, folder: Path) -> None:
    """A reward model of one layer with the policy's tokenizer and random weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=4096, **sizes)
    config.pad_token_id = tokenizer.pad_token_id
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_the_tutorial_runs(
    server: PrefectServer,
    long_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_classifier(long_model, tmp_path / "classifier")
    questions = block("json").splitlines()
    more = [questions[0].replace("basil", plant) for plant in ("mint", "ivy", "moss", "fern", "kale", "dill")]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions + more) + "\n")
    settings: dict[str, Any] = yaml.safe_load(block("yaml"))
    settings["model"] = {"path": str(long_model), "dtype": "float32"}
    settings["reward"]["model"] = {"path": "classifier", "dtype": "float32"}
    settings["sampling"]["max_new_tokens"] = 8
    settings["training"]["precision"] = "fp32"
    (tmp_path / "helpful.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        line
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
        for line in text.splitlines()
        if not language and line.startswith("qrpo ") and line != "qrpo doctor"
    ]
    assert len(lines) == 9
    for line in lines:
        if "PROMPT_ID" in line:
            steps = stored_steps(Workspace(load_experiment(Path("helpful.yaml"), [])))
            line = line.replace("PROMPT_ID", next(iter(steps.first.rewards.completions.wanted)))
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(line)[1:])
        assert stopped.value.code == 0, line
        assert capsys.readouterr().out, line
    assert (tmp_path / "helpful.html").stat().st_size > 10_000
