"""Chat templates in the manner of the families in use, on byte-level tokenizers with their control tokens."""

from __future__ import annotations

from typing import Any, NamedTuple


def _chatml(content: str) -> str:
    return "{{ '<|im_start|>' + m['role'] + '\\n' + " + content + " + '<|im_end|>\\n' }}"


def _opening(thinking: str = "") -> str:
    return "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}" + thinking + "{% endif %}"


#: The thinking of an answer into `r`, the rest into `c`.
_SPLIT = (
    "{% set c = m['content'] %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
_LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
_THINKING_LAST = (
    _LAST_USER
    + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    + _SPLIT
    + "{% if loop.index0 > ns.last %}"
    + _chatml("'<think>\\n' + r + '\\n</think>\\n\\n' + c")
    + "{% else %}"
    + _chatml("c")
    + "{% endif %}{% else %}"
    + _chatml("m['content']")
    + "{% endif %}{% endfor %}"
)


class Family(NamedTuple):
    """template; special tokens, the first being BOS ("" for none) and the second the end; other added tokens.

    ends : what ends a completion. plain, thinking : the tokens of "Fine." and of that answer with thinking,
    as the text that they stand for; None where it is refused.
    """

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    plain: str | None = ""
    thinking: str | None = ""
    variables: dict[str, Any] | None = None
    system: bool = True

    def tokenizer(self) -> Any:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens([token for token in self.special if token])
        core.add_tokens([AddedToken(token, normalized=False, special=False) for token in self.added])
        names = {"eos_token": self.special[1]} | ({"bos_token": self.special[0]} if self.special[0] else {})
        made = PreTrainedTokenizerFast(tokenizer_object=core, **names)
        made.chat_template = self.template
        return made


QUESTION = "Hi there"
THOUGHT = "<think>\nhm\n</think>\n\nFine."
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_IM = ("", "<|im_end|>", "<|im_start|>", "<|endoftext|>")

FAMILIES = {
    "qwen2.5": Family(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}" + _chatml("m['content']") + "{% endfor %}" + _opening(),
        _IM,
        _THINK,
        plain="Fine.<|im_end|>",
        thinking="<think>\nhm\n</think>\n\nFine.<|im_end|>",
    ),
    "qwen3": Family(
        _THINKING_LAST
        + _opening(
            "{% if enable_thinking is defined and enable_thinking is false %}"
            "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        ),
        _IM,
        _THINK,
        plain="<think>\n\n</think>\n\nFine.<|im_end|>",
        thinking="<think>\nhm\n</think>\n\nFine.<|im_end|>",
    ),
    "lfm": Family(
        "{{ bos_token }}"
        + _LAST_USER
        + "{% for m in messages %}{% set c = m['content'] %}"
        + "{% if m['role'] == 'assistant' and loop.index0 < ns.last and '</think>' in c %}"
        + "{% set c = c.split('</think>')[-1] | trim %}{% endif %}"
        + _chatml("c")
        + "{% endfor %}"
        + _opening(),
        ("<|startoftext|>", "<|im_end|>", "<|im_start|>", "<|tool_call_start|>", "<|tool_call_end|>"),
        ("<think>", "</think>"),
        plain="Fine.<|im_end|>",
        thinking="<think>\nhm\n</think>\n\nFine.<|im_end|>",
    ),
    "glm": Family(
        "[gMASK]<sop>"
        + _LAST_USER
        + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + _SPLIT
        + "{{ '<|assistant|>\\n<think>' + (r if loop.index0 > ns.last else '') + '</think>\\n' + c }}"
        + "{% else %}{{ '<|' + m['role'] + '|>\\n' + m['content'] }}{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        (
            "",
            "<|endoftext|>",
            "[gMASK]",
            "<sop>",
            "<|system|>",
            "<|user|>",
            "<|assistant|>",
            "<|observation|>",
        ),
        _THINK,
        ends=("<|user|>", "<|observation|>"),
        plain="\n<think></think>\nFine.<|user|>",
        thinking="\n<think>hm</think>\nFine.<|user|>",
    ),
    "llama3.2": Family(
        "{{ bos_token }}{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
        "{% endif %}{% endif %}{% if messages[0]['role'] == 'system' %}"
        "{% set s = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + s }}"
        "<|eot_id|>{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
        "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        plain="Fine.<|eot_id|>",
        thinking="<think>\nhm\n</think>\n\nFine.<|eot_id|>",
    ),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        plain=" Fine.</s>",
        thinking=" <think>\nhm\n</think>\n\nFine.</s>",
        system=False,
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
        "+ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ends=("<end_of_turn>",),
        plain="Fine.<end_of_turn>",
        thinking="<think>\nhm\n</think>\n\nFine.<end_of_turn>",
        system=False,
    ),
    "deepseek-r1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
        "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
        "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        ("<think>", "</think>"),
        plain="\n</think>\n\nFine.<｜end▁of▁sentence｜>",
        thinking="hm\n</think>\n\nFine.<｜end▁of▁sentence｜>",
    ),
    "qwq": Family(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + _chatml("m['content'].split('</think>')[-1].lstrip('\\n')")
        + "{% else %}"
        + _chatml("m['content']")
        + "{% endif %}{% endfor %}"
        + _opening("{{ '<think>\\n' }}"),
        _IM,
        _THINK,
        plain="\n</think>\n\nFine.<|im_end|>",
        thinking="hm\n</think>\n\nFine.<|im_end|>",
    ),
    "qwen3-thinking": Family(
        _THINKING_LAST + _opening("{{ '<think>\\n' }}"),
        _IM,
        _THINK,
        plain="\n</think>\n\nFine.<|im_end|>",
        thinking="hm\n</think>\n\nFine.<|im_end|>",
    ),
}
FAMILIES["qwen3, not thinking"] = FAMILIES["qwen3"]._replace(
    plain="Fine.<|im_end|>", thinking=None, variables={"enable_thinking": False}
)
