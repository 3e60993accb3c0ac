"""The study's policy and prompts: openings of sentences, which SmolLM2 continues as plain text.

    python benchmarks/study/real_model/prompts.py FOLDER

writes FOLDER/prompts.jsonl and FOLDER/model. The model is SmolLM2-135M-Instruct with a chat template that
adds nothing to a text, so a prompt is 5 to 9 tokens long: most of the study's time would else go into the
same tokens of every prompt. Nouns and adjectives are those of the package wonderwords.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from _smollm2 import smollm2  # noqa: E402

PROMPTS, SEED = 540, 0
_OPENINGS = (
    "After a week with the {noun}, we felt",
    "My friend says that the {noun} is",
    "Everybody in the village thinks the {noun} was",
    "The {adjective} {noun} made us feel",
    "To be honest, the {noun} was",
    "When the {noun} arrived, the family was",
)
_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)


def openings() -> Iterator[str]:
    """Openings without repetition, in an order that the seed decides."""
    from wonderwords import Defaults, RandomWord

    words = {
        kind: sorted(RandomWord(**{kind: listed}).filter(word_max_length=9, regex="[a-z]+"))
        for kind, listed in (("noun", Defaults.NOUNS), ("adjective", Defaults.ADJECTIVES))
    }
    draw, found = random.Random(SEED), set()
    while True:
        chosen = {kind: draw.choice(listed) for kind, listed in words.items()}
        text = draw.choice(_OPENINGS).format(**chosen)
        if text not in found:
            found.add(text)
            yield text


def write(folder: Path) -> None:
    """Write prompts and model, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    source = openings()
    lines = [json.dumps({"prompt": next(source)}) for _ in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    model = folder / "model"
    if not model.is_dir():
        partial = folder / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(smollm2(), partial)
        (partial / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
        partial.rename(model)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
