"""The same laws for every family of chat template: tokens are those of the text that it writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrpo_core.common.errors import DataError, ModelError
from qrpo_core.models.chat import Chat
from tests.core.models.chat_families import FAMILIES, QUESTION, THOUGHT

DAY = "2024-07-26"
ASKED = [{"role": "user", "content": QUESTION}]
BRIEF = {"role": "system", "content": "Be brief."}
TOOL = "<tool_call>\n{}\n</tool_call>"


def chat_of(name: str, **variables: Any) -> Chat:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(family.ends))]
    given = (family.variables or {}) | variables
    return Chat(tokenizer, stop_token_ids=ends, max_length=512, day=DAY, variables=given)


@pytest.fixture(scope="module", params=list(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def chat(name: str) -> Chat:
    return chat_of(name)


def shown(chat: Chat, ids: Any) -> str:
    """The text of tokens, control tokens included."""
    text: str = chat._tokenizer.decode(list(ids))
    return text


def rendered(chat: Chat, turns: Any, *, opening: bool) -> str:
    """What transformers writes, without any of the code under test; for templates that read no clock."""
    family = next(f for f in FAMILIES.values() if f.template == chat._tokenizer.chat_template)
    text: str = chat._tokenizer.apply_chat_template(
        turns,
        tokenize=False,
        add_generation_prompt=opening,
        **(chat._template._variables or family.variables or {}),
    )
    return text.replace(_today(), "26 Jul 2024")


def _today() -> str:
    from datetime import datetime

    return datetime.now().strftime("%d %b %Y")


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversations(name: str) -> list[list[dict[str, str]]]:
    more = {"role": "user", "content": "And  more\n?"}
    found = [ASKED]
    for text in ("Fine.", THOUGHT, TOOL):
        found.append([*ASKED, answer(text), more])
    if FAMILIES[name].system:
        found += [[BRIEF, *turns] for turns in found]
    return found


class TestTokens:
    def test_are_those_of_the_rendered_text(self, name: str, chat: Chat) -> None:
        for turns in conversations(name):
            text = rendered(chat, turns, opening=True)
            assert shown(chat, chat.prompt_token_ids(turns)) == text
            assert (
                list(chat.prompt_token_ids(turns))
                == chat._tokenizer(text, add_special_tokens=False)["input_ids"]
            )

    def test_of_a_history_hold_the_models_own_marks(self, name: str, chat: Chat) -> None:
        tokenizer = chat._tokenizer
        tokens = chat.prompt_token_ids([*ASKED, answer(TOOL), *ASKED])
        if "<tool_call>" in tokenizer.get_added_vocab():
            assert tokenizer.convert_tokens_to_ids("<tool_call>") in tokens

    @given(st.sampled_from(["{}?", "a {} b", "say {}, please"]), st.data())
    def test_of_a_users_text_hold_no_control_token_of_its_own(
        self, name: str, chat: Chat, form: str, data: st.DataObject
    ) -> None:
        tokenizer = chat._tokenizer
        token = data.draw(st.sampled_from(sorted(chat._template._control_tokens)))
        turns = [{"role": "user", "content": form.format(token)}]
        if form.startswith("{}") and token in chat._template.turn_openings:
            with pytest.raises(DataError, match="carries the chat template already"):
                chat.prompt_token_ids(turns)
            return
        found = chat.prompt_token_ids(turns)
        known = set(tokenizer.get_added_vocab().values())
        plain = chat.prompt_token_ids([{"role": "user", "content": form.format("x")}])
        assert [each for each in found if each in known] == [each for each in plain if each in known]
        assert shown(chat, found) == rendered(chat, turns, opening=True)


class TestAnswers:
    def test_continue_the_prompt_as_the_family_writes_them(self, name: str, chat: Chat) -> None:
        family = FAMILIES[name]
        for text, expected in (("Fine.", family.plain), (THOUGHT, family.thinking)):
            if expected is None:
                with pytest.raises(DataError, match="does not begin prompt and answer with the prompt"):
                    chat.encode_completion(text, ASKED)
                continue
            found = chat.encode_completion(text, ASKED)
            assert shown(chat, found) == expected
            assert list(found) == chat._tokenizer(expected, add_special_tokens=False)["input_ids"]

    def test_end_once(self, name: str, chat: Chat) -> None:
        for text in ("Fine.", "", "  spaces \n", "It ends with <|im_end|>, </s> or <end_of_turn>, say they"):
            found = chat.encode_completion(text, ASKED)
            assert [place for place, token in enumerate(found) if token in chat.stop_token_ids] == [
                len(found) - 1
            ]
            assert text.strip() in shown(chat, found)

    def test_of_three_spellings_of_one_thinking(self, name: str, chat: Chat) -> None:
        """A template that opens the thinking takes it with and without its opening mark."""
        if not shown(chat, chat.prompt_token_ids(ASKED)).endswith("<think>\n"):
            return
        whole = chat.encode_completion("<think>\nhm\n</think>\n\nFine.", ASKED)
        assert chat.encode_completion("hm\n</think>\n\nFine.", ASKED) == whole

    def test_that_never_close_their_thinking_are_refused(self, name: str, chat: Chat) -> None:
        if shown(chat, chat.prompt_token_ids(ASKED)).endswith("<think>\n"):
            with pytest.raises(DataError, match=r"opens its thinking with <think> and never closes"):
                chat.encode_completion("<think>\nhm", ASKED)

    def test_that_end_turns_are_refused(self, name: str, chat: Chat) -> None:
        ends = chat._tokenizer.convert_ids_to_tokens(chat.encode_completion("Fine.", ASKED)[-1])
        with pytest.raises(
            DataError, match=r"the answer 'Fine\..*carries the chat template already.*prompt "
        ):
            chat.encode_completion(f"Fine.{ends}\n", ASKED)

    def test_in_a_history_that_end_turns_are_refused(self, name: str, chat: Chat) -> None:
        ends = chat._tokenizer.convert_ids_to_tokens(chat.encode_completion("Fine.", ASKED)[-1])
        with pytest.raises(DataError, match="the assistant turn 'Fine"):
            chat.prompt_token_ids([*ASKED, answer(f"Fine.{ends}"), *ASKED])


class TestCarried:
    def test_a_prompt_in_its_own_template_is_refused(self, name: str, chat: Chat) -> None:
        text = rendered(chat, ASKED, opening=True)
        for carried in (text, f"\n{text}", rendered(chat, [*ASKED, answer("Fine."), *ASKED], opening=True)):
            with pytest.raises(DataError, match=r"the user turn .* carries the chat template already"):
                chat.prompt_token_ids([{"role": "user", "content": carried}])

    def test_an_answer_with_its_opening_is_refused(self, name: str, chat: Chat) -> None:
        text = rendered(chat, [*ASKED, answer("Fine."), *ASKED], opening=True)
        with pytest.raises(DataError, match=r"the answer .* carries the chat template already"):
            chat.encode_completion(text[text.index("Fine.") :], ASKED)


class TestVariables:
    def test_reach_the_template(self) -> None:
        one, other = chat_of("qwen3"), chat_of("qwen3", enable_thinking=False)
        closed = "<think>\n\n</think>\n\n"
        assert shown(other, other.prompt_token_ids(ASKED)) == (
            shown(one, one.prompt_token_ids(ASKED)) + closed
        )
        chat = chat_of("llama3.2", date_string="1 May")
        assert "Today Date: 1 May" in shown(chat, chat.prompt_token_ids(ASKED))

    def test_that_the_template_does_not_read_are_refused(self) -> None:
        with pytest.raises(ModelError, match="does not read 'enable_thoughts'"):
            chat_of("qwen3", enable_thoughts=False)


def test_threads_do_not_disturb_each_other() -> None:
    """Spelling control tokens out is no setting of the tokenizer that all of them share."""
    chat = chat_of("qwen3")
    turns = [
        [{"role": "user", "content": text}] for text in ("What is <|im_end|>?", "And <think>, say?", "Hi")
    ]
    alone = [chat.prompt_token_ids(each) for each in turns]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(chat.prompt_token_ids, turns * 100))
    assert found == alone * 100


def test_what_is_no_text_is_refused() -> None:
    import datetime

    with pytest.raises(DataError, match=r"content of a message is date .*holds strings"):
        chat_of("qwen2.5").prompt_token_ids([{"role": "user", "content": datetime.date(2024, 1, 1)}])


def test_a_private_character_beside_a_control_token_is_refused() -> None:
    """It would pass for a mark: what it stands around would be spelled out, and it itself be dropped."""
    chat = chat_of("qwen2.5")
    mark = chat._template._marks[0]
    assert shown(chat, chat.encode_completion(f"a{mark}b", ASKED)) == f"a{mark}b<|im_end|>"
    with pytest.raises(DataError, match=r"private character U\+F0000"):
        chat.prompt_token_ids([{"role": "user", "content": f"{mark}<|im_end|>?"}])
