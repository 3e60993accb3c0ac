"""The reward `model`: how a conversation is read, and what is refused before weights are read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qrpo_core.common.errors import ConfigError, DataError, ModelError
from qrpo_core.config import RewardConfig
from qrpo_core.config.rewards import ModelRewardConfig
from qrpo_core.rewards.base import RewardRequest, Score
from qrpo_core.rewards.model.classifier import load_tokenizer
from qrpo_core.rewards.model.reward import ModelReward
from qrpo_core.rewards.model.text import Conversations
from qrpo_core.rewards.registry import reward_identity

#: That of the tiny model.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] "
    "+ '<|end|>' }}{% endfor %}"
)
MakeClassifier = Callable[..., Path]


def rows(count: int = 9) -> list[RewardRequest]:
    return [RewardRequest(f"p{i}", i, (("user", "Q"),), "word " * (i + 1), None) for i in range(count)]


def reward(path: Path, **settings: Any) -> ModelReward:
    return ModelReward(ModelRewardConfig(path=str(path), dtype="float32", **settings))


def values(scores: list[Score]) -> list[float]:
    assert {score.status for score in scores} <= {"ok"}, scores
    return [float(score.reward) for score in scores]  # type: ignore[arg-type]


def encoded(path: Path, request: RewardRequest) -> tuple[int, ...]:
    config = ModelRewardConfig(path=str(path))
    return Conversations(load_tokenizer(path, config), str(path)).encode(request)


def test_bos_is_written_once_whoever_writes_it(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    request = RewardRequest("p", 0, (("user", "Q"),), "A <|end|> <|bos|>", None)
    bare = TEMPLATE.removeprefix("{{ bos_token }}")
    made = {
        (template, adds): encoded(
            make_tiny_model(tmp_path / f"{len(template)}{adds}", template=template, add_bos=adds), request
        )
        for template in (TEMPLATE, bare)
        for adds in (False, True)
    }
    ids = made[TEMPLATE, False]
    assert ids.count(256) == 1  # <|bos|>: the one in the text is text
    assert ids[0] == 256
    assert ids[-1] == 258  # <|end|>, and no opening of another turn
    assert list(ids).count(258) == 2
    assert made[TEMPLATE, True] == made[bare, True] == ids
    assert made[bare, False] == ids[1:]
    with pytest.raises(ModelError, match="two BOS"):
        encoded(
            make_tiny_model(tmp_path / "twice", template="{{ bos_token }}" + TEMPLATE, add_bos=True), request
        )


def test_what_the_tokenizer_writes_at_the_end_is_written_too(
    make_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        make_tiny_model(tmp_path / "m", template="{{ messages[-1].content }}{{ messages[0].content }}")
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eos|>", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 256), ("<|eos|>", 257)]
    )
    request = RewardRequest("p", 0, (("user", "Q"),), "A", None)
    ids = Conversations(tokenizer, "here").encode(request)
    assert (ids[0], ids[-1], len(ids)) == (256, 257, 4)


def test_templates_that_lose_text_are_refused(make_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    request = RewardRequest("p7", 0, (("system", "Be kind"), ("user", "Q")), "The answer", None)

    def score(name: str, template: str) -> Any:
        return encoded(make_tiny_model(tmp_path / name, template=template), request)

    with pytest.raises(ModelError, match="drops or changes the system turn 'Be kind'"):
        score("a", "{{ messages[1].content }}{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="drops or changes the completion"):
        score("b", "{{ messages[0].content }}{{ messages[1].content }}")
    with pytest.raises(DataError, match=r"refuses the conversation \(no system\) \[prompt p7"):
        score("c", "{{ raise_exception('no system') }}")


def test_a_missing_chat_template_is_refused_before_anything_is_loaded(
    make_classifier: MakeClassifier,
) -> None:
    path = make_classifier("Llama", tokenizer={"chat_template": None})
    for use in (lambda: reward(path).problems(()), lambda: reward(path).score(rows(1))):
        with pytest.raises(ModelError, match=r"chat template .* missing"):
            use()
    from transformers import AutoTokenizer

    with pytest.raises(ModelError, match="no chat template"):
        Conversations(AutoTokenizer.from_pretrained(path), "here")


CODE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

class Head(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.read = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        mean = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return SequenceClassifierOutput(logits=self.read(mean)[:, 0])
"""


@pytest.fixture
def custom(make_classifier: MakeClassifier, tmp_path: Path) -> Path:
    """A classifier whose head is code in its directory, and gives logits [rows]."""
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(make_classifier("Llama"), tmp_path / "custom_head"))
    (path / "head.py").write_text(CODE)
    config = json.loads((path / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForSequenceClassification": "head.Head"}, "architectures": ["Head"]}
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    weights["read.weight"] = weights.pop("score.weight")
    weights["read.bias"] = torch.tensor([2.0])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_code_of_the_model_is_run_only_with_trust(custom: Path) -> None:
    with pytest.raises(ConfigError, match=r"brings code .*head.Head in config.json.*trust_remote_code"):
        reward(custom).problems(())
    found = values(reward(custom, trust_remote_code=True).score(rows(9)))
    assert found == pytest.approx(
        values(reward(custom, trust_remote_code=True, batch_tokens=1).score(rows(9))), abs=1e-4
    )
    assert len(set(found)) == 9
    before = reward_identity(
        RewardConfig(kind="model", model={"path": str(custom), "trust_remote_code": True})
    )
    (custom / "deep").mkdir()
    (custom / "deep" / "more.py").write_text("x = 1")
    after = reward_identity(
        RewardConfig(kind="model", model={"path": str(custom), "trust_remote_code": True})
    )
    assert before != after


def test_code_elsewhere_is_refused(custom: Path) -> None:
    config = json.loads((custom / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "someone/else--config.C"}
    (custom / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="in another repository"):
        reward(custom, trust_remote_code=True).problems(())


@pytest.mark.parametrize("revision", [None, "main", "abc1234", "A" * 40])
def test_trusted_hub_code_needs_a_commit(revision: str | None) -> None:
    config = ModelRewardConfig(path="someone/model", trust_remote_code=True, revision=revision)
    with pytest.raises(ConfigError, match=r"set reward\.model\.revision to the commit"):
        ModelReward(config).problems(())
    pinned = ModelRewardConfig(path="someone/model", trust_remote_code=True, revision="a" * 40)
    with pytest.raises(
        ModelError, match="nor an available hub model"
    ):  # past that rule; the tests are offline
        ModelReward(pinned).problems(())


def test_what_is_no_reward_model_is_refused(
    make_classifier: MakeClassifier, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM, not a sequence classifier"):
        reward(tiny_model).problems(())
    with pytest.raises(ConfigError, match="GGUF"):
        reward(Path("model.gguf")).problems(())
    with pytest.raises(ModelError, match=r"no model directory.*reward\.model\.path") as caught:
        ModelReward(ModelRewardConfig(path="./nowhere")).problems(())
    assert " model.path" not in str(caught.value)
    # A classifier's config over a policy's weights: its head would be random.
    headless = Path(shutil.copytree(tiny_model, tmp_path / "headless"))
    config = json.loads((headless / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    (headless / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"missing, the first is score.weight"):
        reward(headless).score(rows(1))


def test_the_identity_is_content_and_never_a_place(make_classifier: MakeClassifier, tmp_path: Path) -> None:
    path = make_classifier("Llama")
    copy = shutil.copytree(path, tmp_path / "copy")

    def identity(place: Path, **settings: Any) -> dict[str, Any]:
        return reward_identity(RewardConfig(kind="model", model={"path": str(place), **settings}))

    assert identity(path) == identity(copy) == identity(path, batch_tokens=7)
    assert str(path) not in json.dumps(identity(path))
    assert identity(path) != identity(path, max_length=9)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(path) != identity(copy)
    term = {"weight": 1.0, "reward": {"kind": "model", "model": {"path": str(path)}}}
    inner = {"kind": "weighted", "terms": [{"weight": 1.0, "reward": {"kind": "sentiment"}}, term]}
    nested = reward_identity(RewardConfig(kind="weighted", terms=[{"weight": 2.0, "reward": inner}]))
    assert nested["identities"] == {"terms.0.terms.1": identity(path)["identities"]["reward"]}


def test_naming_and_checking_import_neither_torch_nor_transformers(make_classifier: MakeClassifier) -> None:
    code = f"""
import sys
from qrpo_core.config import RewardConfig
from qrpo_core.rewards.registry import check_ground_truths, make_reward, reward_identity
config = RewardConfig(kind="model", model={{"path": {str(make_classifier("Llama"))!r}}})
make_reward(config), check_ground_truths(config, []), reward_identity(config)
print([name for name in ("torch", "transformers", "scipy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
