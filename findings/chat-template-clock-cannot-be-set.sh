#!/usr/bin/env bash
# transformers 5.23.0: a chat template that calls strftime_now (Llama 3.2's does) always gets the local clock.
# Keywords of apply_chat_template reach the template as variables, so one expects
# apply_chat_template(..., strftime_now=my_function) to shadow the built-in one. The function is turned into text
# on the way, and calling it fails in the template. There is no other argument for the date.
# Seen: without the keyword today's date; with it an error that says that a text is not callable.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 jinja2==3.1.6
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import datetime
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
tokenizer.chat_template = "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}"
turns = [{"role": "user", "content": "hello"}]
plain = tokenizer.apply_chat_template(turns, tokenize=False)
print("without the keyword:", plain)
assert plain == f"{datetime.date.today().year} hello"
try:
    given = tokenizer.apply_chat_template(turns, tokenize=False, strftime_now=lambda pattern: "1999")
except Exception as error:
    print("with the keyword:", type(error).__name__, error)
else:
    print("with the keyword:", given)
    raise SystemExit("the behaviour has changed")
PY
echo "as described"
