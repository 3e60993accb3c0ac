"""Chat templates: one BOS, one end token, the answer as the template would write it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError, ModelError
from qrpo_core.common.hashing import prompt_id
from qrpo_core.common.thinking_marks import THINKING
from qrpo_core.models.chat import Chat
from qrpo_core.models.loading import load_tokenizer
from qrpo_core.models.special_tokens import special_tokens

HELLO = [{"role": "user", "content": "Hello"}]
#: Characters that survive a trip through JSON and the tokenizer; text that looks like tokens is among them.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["<|end|>?", "a<|bos|>b", " <|eos|>.", "a <|assistant|> b", " x ", "\n\n", "ünïcode 🙂"]
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
)

OPENING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat.load(tiny_model)


@pytest.fixture
def chat_of(make_tiny_model: Make, tmp_path: Path) -> Callable[..., Chat]:
    """The chat of a tiny model with another template."""

    def make(template: str, **settings: bool) -> Chat:
        return Chat.load(make_tiny_model(tmp_path / "model", template=template, **settings))

    return make


def ids(chat: Chat, text: str) -> list[int]:
    """What the tokenizer makes of decorated text."""
    tokens: list[int] = chat._tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def special_in(folder: Path, tokens: Sequence[str]) -> Path:
    """The folder, whose tokenizer now calls these tokens special."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(folder)
    return folder


class TestLoad:
    def test_end_tokens_of_all_files_together(self, tiny_model: Path, tmp_path: Path) -> None:
        chat = Chat.load(tiny_model)
        assert chat.stop_token_ids == (257, 258)
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in tiny_model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 261}))
        assert Chat.load(copy).stop_token_ids == (257, 258, 261)
        (copy / "generation_config.json").unlink()
        assert Chat.load(copy).stop_token_ids == (257, 261)

    def test_vocabulary_and_length(self, chat: Chat) -> None:
        assert (chat.vocab_size, chat.max_length) == (262, 512)

    def test_a_config_without_length_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in tiny_model.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        config = json.loads((copy / "config.json").read_text())
        del config["max_position_embeddings"]
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=r"longest sequence.*config\.json.*max_position_embeddings"):
            Chat.load(copy)


class TestPrompts:
    def test_the_template_applied_once(self, chat: Chat) -> None:
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "1 + 1"},
        ]
        expected = (
            "<|bos|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Yes?<|end|><|user|>1 + 1<|end|>"
            "<|assistant|>"
        )
        assert list(chat.prompt_token_ids(turns)) == ids(chat, expected)

    @pytest.mark.parametrize("writes", [True, False])
    @pytest.mark.parametrize("adds", [True, False])
    def test_one_bos_whoever_writes_it(self, chat_of: Callable[..., Chat], writes: bool, adds: bool) -> None:
        """From the template, from the tokenizer, from both: one. From neither: none."""
        body = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + OPENING
        prompt = chat_of(("{{ bos_token }}" if writes else "") + body, add_bos=adds).prompt_token_ids(HELLO)
        assert prompt.count(256) == int(writes or adds)
        assert (prompt[0] == 256) == (writes or adds)

    def test_two_bos_are_refused(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}" + OPENING)
        with pytest.raises(ModelError, match="two BOS"):
            chat.prompt_token_ids(HELLO)

    @given(text=TEXTS)
    def test_a_users_text_is_text(self, chat: Chat, text: str) -> None:
        """Whatever a user writes, the control tokens of the prompt are those of the template; a text that is
        a turn already is refused."""
        assume(chat._template.carried(text) is None)
        prompt = chat.prompt_token_ids([{"role": "user", "content": text}])
        assert [token for token in prompt if token >= 256] == [256, 260, 258, 261]

    def test_a_refused_system_turn_is_named(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of(NO_SYSTEM)
        assert chat.prompt_token_ids(HELLO)
        with pytest.raises(DataError, match=r"refuses a system turn \(System role not supported\).*prompt "):
            chat.prompt_token_ids([{"role": "system", "content": "Be brief."}, *HELLO])

    def test_a_dropped_system_turn_is_refused(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}")
        with pytest.raises(DataError, match=r"drops or changes the system turn 'Be brief\.'"):
            chat.prompt_token_ids([{"role": "system", "content": "Be brief."}, *HELLO])

    def test_the_opening_is_what_the_template_adds_behind_the_prompt(
        self, chat: Chat, chat_of: Callable[..., Chat]
    ) -> None:
        assert chat.turn_opening(HELLO) == "<|assistant|>"
        thinking = chat_of(
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
        )
        asked = [{"role": "user", "content": "What does <think> mean?"}]
        assert thinking.turn_opening(asked) == "<|assistant|><think>\n"

    @pytest.mark.parametrize(
        ("template", "header"),
        [
            (
                "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}",
                "<|assistant|>",
            ),
            (
                "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}",
                "assistant: ",
            ),
            ("{% for m in messages %}{{ m['content'] }}{% endfor %}<|assistant|>", "Q7user"),
        ],
    )
    def test_a_template_without_generation_prompt_is_refused(
        self, chat_of: Callable[..., Chat], template: str, header: str
    ) -> None:
        """The answer would begin with the header of its turn, which the model is never given to write."""
        chat = chat_of(template)
        for ask in (chat.check, lambda: chat.prompt_token_ids(HELLO), lambda: chat.encode_completion("Yes")):
            with pytest.raises(ModelError, match="add_generation_prompt") as refused:
                ask()
            assert f"no generation prompt: it writes {header!r} before an answer" in str(refused.value)

    def test_a_refused_conversation_names_the_prompt(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of("{{ raise_exception('roles must alternate') }}")
        with pytest.raises(DataError, match=rf"roles must alternate.*prompt {prompt_id(HELLO)}"):
            chat.prompt_token_ids(HELLO)
        with pytest.raises(DataError, match="empty conversation"):
            chat.prompt_token_ids([])


class TestCompletions:
    def test_as_the_template_writes_the_turn(self, chat: Chat) -> None:
        assert list(chat.encode_completion("Fine, thanks")) == ids(chat, "Fine, thanks<|end|>")

    @given(text=TEXTS)
    def test_decoding_gives_the_text_back(self, chat: Chat, text: str) -> None:
        assume(chat._template.carried(text, answer=True) is None)
        tokens = chat.encode_completion(text, HELLO)
        assert tokens[-1] == 258
        assert not set(tokens[:-1]) & set(chat.stop_token_ids)
        assert chat.decode(tokens) == text
        assert chat.decode(tokens[:-1]) == text

    def test_what_follows_the_end_token_is_not_part_of_it(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of(
            "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        assert list(chat.encode_completion("Yes")) == ids(chat, "Yes<|end|>")

    def test_a_prompt_that_is_no_prefix_is_refused(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of(
            "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>think{% endif %}"
        )
        with pytest.raises(DataError, match="does not begin prompt and answer with the prompt"):
            chat.encode_completion("Yes")

    def test_an_answer_without_end_token_is_refused(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        with pytest.raises(ModelError, match="does not end the assistant's turn"):
            chat.encode_completion("Yes")

    def test_an_answer_that_the_template_cuts_is_refused(self, chat_of: Callable[..., Chat]) -> None:
        chat = chat_of("{% for m in messages %}{{ m['content'].split('</think>')[-1] }}<|end|>{% endfor %}")
        assert chat.encode_completion("Yes")
        with pytest.raises(DataError, match="drops or changes the answer 'hmm</think>Yes'"):
            chat.encode_completion("hmm</think>Yes")

    def test_special_tokens_are_not_shown(self, chat: Chat) -> None:
        assert chat.decode(ids(chat, " a <|user|>b<|end|>")) == " a b"
        assert chat.decode(()) == ""

    @pytest.mark.parametrize("pair", THINKING)
    def test_marks_of_thinking_are_shown_though_special(
        self, make_tiny_model: Make, tmp_path: Path, pair: tuple[str, str]
    ) -> None:
        """With other special tokens between them, which are not; and the answer gives its text back."""
        folder = special_in(make_tiny_model(tmp_path / "model"), pair)
        special = Chat.load(folder)
        text = f"{pair[0]}hm{pair[1]}\n\nFine."
        tokens = special.encode_completion(text, HELLO)
        assert len(tokens) == len("hm\n\nFine.") + 3
        assert special.decode(tokens) == text
        assert (
            special.decode(ids(special, f"{pair[0]} a<|user|>{pair[1]}b<|end|>")) == f"{pair[0]} a{pair[1]}b"
        )
        assert special_tokens(folder) >= set(pair)

    def test_marks_that_a_reward_names_are_shown_too(self, make_tiny_model: Make, tmp_path: Path) -> None:
        pair = ("<|reasons|>", "<|so|>")
        folder = special_in(make_tiny_model(tmp_path / "model"), pair)
        text = "<|reasons|>hm<|so|>Fine."
        named = Chat.load(folder, marks=set(pair))
        assert named.decode(named.encode_completion(text, HELLO)) == text
        assert named.decode(ids(Chat.load(folder), text)) == text
        assert Chat.load(folder).decode(ids(named, text)) == "hmFine."


@pytest.mark.slow
def test_the_real_template(smollm2: Path) -> None:
    """SmolLM2's BOS is its turn marker: it begins every turn, and no other BOS is put before."""
    chat = Chat.load(smollm2)
    prompt = chat.prompt_token_ids([{"role": "system", "content": "Be kind."}, *HELLO])
    expected = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(prompt) == ids(chat, expected)
    assert chat.stop_token_ids == (2,)
    assert list(chat.encode_completion("Hi there!")) == ids(chat, "Hi there!<|im_end|>")
    assert (chat.vocab_size, chat.max_length) == (49152, 8192)
